from abc import ABCMeta, abstractmethod

from torch import nn

from detectron2.layers import ShapeSpec


class Backbone(nn.Module, metaclass=ABCMeta):
    """The abstract backbone: an initialiser without arguments, ``forward`` and three facts."""

    def __init__(self):
        super().__init__()

    @abstractmethod
    def forward(self):
        """Features by name."""

    @property
    def size_divisibility(self):
        return 0

    @property
    def padding_constraints(self):
        return {}

    def output_shape(self):
        return {
            name: ShapeSpec(
                channels=self._out_feature_channels[name], stride=self._out_feature_strides[name]
            )
            for name in self._out_features
        }
