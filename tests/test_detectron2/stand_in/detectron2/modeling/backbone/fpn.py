"""As much of an FPN as shows what it asks of the backbone below it."""

from torch import nn

from .backbone import Backbone


class LastLevelMaxPool(nn.Module):
    """One more level."""


class FPN(Backbone):
    """Takes features by name and needs strides that double."""

    def __init__(
        self,
        bottom_up,
        in_features,
        out_channels,
        norm='',
        top_block=None,
        fuse_type='sum',
        square_pad=0,
    ):
        super().__init__()
        assert isinstance(bottom_up, Backbone)
        assert in_features, in_features
        shapes = bottom_up.output_shape()
        strides = [shapes[name].stride for name in in_features]
        for one, other in zip(strides, strides[1:], strict=False):
            assert other == 2 * one, strides
        self.bottom_up, self.in_features = bottom_up, tuple(in_features)
        self.laterals = nn.ModuleList(
            nn.Conv2d(shapes[name].channels, out_channels, 1) for name in in_features
        )

    def forward(self, x):
        features = self.bottom_up(x)
        return {
            name: lateral(features[name])
            for name, lateral in zip(self.in_features, self.laterals, strict=True)
        }
