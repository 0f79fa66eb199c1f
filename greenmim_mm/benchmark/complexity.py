"""Parameters and multiply-adds of a model, counted without its values and without running it."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

# As Swin's repository counts detectors.
_BOXES, _MASKS = 1000, 100


class _Hollow(TorchFunctionMode):
    """Makes ``torch.empty`` take no memory; other tensors stay as they are.

    Constructors ask some for their values, e.g. for the rates of stochastic depth.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake

    def __torch_function__(self, func, types, args=(), kwargs=None):
        with self.fake if func is torch.empty else nullcontext():
            return func(*args, **(kwargs or {}))


class HollowModel:
    """A model of full size whose parameters have shapes and no values.

    Large networks are built in a fraction of a second and take no memory.

    Args:
        model: Config of the model; its scope must be the default one
            (``mmengine.registry.init_default_scope``).

    Attributes:
        module: The model.
    """

    def __init__(self, model: dict) -> None:
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        with _Hollow(self._fake):
            self.module: nn.Module = MODELS.build(model)
        self.module.eval()

    def num_parameters(self, part: str = '') -> int:
        """Parameters of the model, or of a part such as 'backbone'."""
        module = self.module.get_submodule(part)
        return sum(parameter.numel() for parameter in module.parameters())

    def multiply_adds(self, size: Sequence[int]) -> int:
        """Multiply-adds of the matrix products and convolutions for one image.

        Papers call them FLOPs. Norms, activations and softmax are left out. A detector is counted
        with 1,000 boxes and 100 masks for each of its heads, as Swin's repository does; of DINO
        backbone and neck are counted. GreenMIM hides its ``mask_ratio`` of the image.

        Args:
            size: Height and width of the image in pixels.
        """
        model = self.module
        image = self._tensor(1, 3, *size)
        kind = type(model).__name__
        if kind == 'GreenMIM':
            units = size[0] * size[1] // 32**2
            mask = np.arange(units) < round(units * model.mask_ratio)
            # Evenly spread, and the same at every call.
            mask = np.random.default_rng(0).permutation(mask)
            return self._count(model.reconstruct, image, mask)
        if kind == 'SimMIM':
            mask = torch.zeros(1, size[0] // 4, size[1] // 4)
            return self._count(lambda: model.neck(model.backbone(image, mask)[-1]))
        if kind == 'EncoderDecoder':
            return self._count(lambda: model.decode_head(model.backbone(image)))
        if not hasattr(model, 'roi_head'):
            return self._count(model.extract_feat, image)
        return self._count(self._detect, image)

    def _detect(self, image: Tensor) -> None:
        model, roi = self.module, self.module.roi_head
        model.rpn_head(model.extract_feat(image))
        boxes, masks = (
            self._tensor(count, extractor.out_channels, *extractor.roi_layers[0].output_size)
            for count, extractor in (
                (_BOXES, _first(roi.bbox_roi_extractor)),
                (_MASKS, _first(roi.mask_roi_extractor)),
            )
        )
        for heads, rois in ((roi.bbox_head, boxes), (roi.mask_head, masks)):
            for head in heads if isinstance(heads, nn.ModuleList) else [heads]:
                head(rois)

    def _tensor(self, *shape: int) -> Tensor:
        with self._fake:
            return torch.empty(shape)

    def _count(self, function: Callable, *args: Any) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad(), self._fake:
            function(*args)
        return counter.get_total_flops() // 2


def _first(module: nn.Module) -> nn.Module:
    """A module, or the first of equal ones."""
    return module[0] if isinstance(module, nn.ModuleList) else module
