"""Tiny Swins of every library and how each gives the maps of its stages."""

from collections.abc import Callable

import torch
from mmdet.models.backbones.swin import SwinTransformer as MMDetSwin
from mmpretrain.models.backbones import SwinTransformer as MMPretrainSwin
from mmpretrain.models.backbones import SwinTransformerV2 as MMPretrainSwinV2
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from timm.models.swin_transformer_v2 import SwinTransformerV2 as TimmSwinV2
from torch import Tensor, nn
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2
from torchvision.models.swin_transformer import SwinTransformer as TorchvisionSwin
from transformers import (
    SwinBackbone,
    SwinConfig,
    SwinForImageClassification,
    SwinForMaskedImageModeling,
    SwinModel,
    Swinv2Config,
    Swinv2ForImageClassification,
    Swinv2ForMaskedImageModeling,
    Swinv2Model,
)

from greenmim_mm.models import GreenSwin, GreenSwinV2

DIMS = 8
DEPTHS = (2, 2, 2, 2)
HEADS = (1, 2, 2, 4)
WINDOW = 4
# The smallest map is larger than a window, so that all libraries shift it.
IMAGE = 256
ARCH = dict(embed_dims=DIMS, depths=DEPTHS, num_heads=HEADS)
ARCH_V2 = dict(ARCH, extra_norm_every_n_blocks=0)
OUTPUTS = (0, 1, 2, 3)


def randomised(module: nn.Module) -> nn.Module:
    """Every parameter random: zeros and ones would hide a wrong order."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2)
    module.eval()  # OpenMMLab's returns nothing.
    return module


def green(version: int, **changes) -> nn.Module:
    if version == 1:
        return GreenSwin(**{**dict(arch=ARCH, window_size=WINDOW, out_indices=OUTPUTS), **changes})
    return GreenSwinV2(**{**dict(arch=ARCH_V2, window_size=WINDOW, out_indices=OUTPUTS), **changes})


def timm_swin(version: int, **changes) -> nn.Module:
    arguments = dict(
        img_size=IMAGE,
        embed_dim=DIMS,
        depths=DEPTHS,
        num_heads=HEADS,
        window_size=WINDOW,
        num_classes=5,
    )
    return (TimmSwin if version == 1 else TimmSwinV2)(**{**arguments, **changes})


def torchvision_swin(version: int) -> nn.Module:
    parts = dict(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2)
    return TorchvisionSwin(
        patch_size=[4, 4],
        embed_dim=DIMS,
        depths=list(DEPTHS),
        num_heads=list(HEADS),
        window_size=[WINDOW, WINDOW],
        num_classes=5,
        **(parts if version == 2 else {}),
    )


def mmpretrain_swin(version: int) -> nn.Module:
    shared = dict(img_size=IMAGE, out_indices=OUTPUTS)
    if version == 1:
        block = dict(block_cfgs=dict(window_size=WINDOW))
        return MMPretrainSwin(arch=ARCH, stage_cfgs=block, **shared)
    return MMPretrainSwinV2(arch=ARCH_V2, window_size=WINDOW, **shared)


def mmdet_swin(version: int = 1) -> nn.Module:
    return MMDetSwin(embed_dims=DIMS, depths=DEPTHS, num_heads=HEADS, window_size=WINDOW)


def huggingface_config(version: int, **changes):
    cls = SwinConfig if version == 1 else Swinv2Config
    arguments = dict(
        image_size=IMAGE,
        embed_dim=DIMS,
        depths=list(DEPTHS),
        num_heads=list(HEADS),
        window_size=WINDOW,
        num_labels=5,
    )
    return cls(**{**arguments, **changes})


HUGGINGFACE = {
    'model': {1: SwinModel, 2: Swinv2Model},
    'classifier': {1: SwinForImageClassification, 2: Swinv2ForImageClassification},
    'simmim': {1: SwinForMaskedImageModeling, 2: Swinv2ForMaskedImageModeling},
    'backbone': {1: SwinBackbone},
}


def huggingface_swin(version: int, kind: str = 'model') -> nn.Module:
    names = [f'stage{stage}' for stage in range(1, 5)]
    changes = dict(out_features=names) if kind == 'backbone' else {}
    return HUGGINGFACE[kind][version](huggingface_config(version, **changes))


LIBRARIES: dict[str, Callable[[int], nn.Module]] = {
    'mmdet': mmdet_swin,
    'mmpretrain': mmpretrain_swin,
    'timm': timm_swin,
    'huggingface': huggingface_swin,
    'torchvision': torchvision_swin,
}


OWN_NORMS = (MMDetSwin, MMPretrainSwin, MMPretrainSwinV2, SwinBackbone, GreenSwin, GreenSwinV2)


@torch.no_grad()
def stage_maps(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Maps ``(B, C, H, W)`` of the four stages.

    They are normalised if the model has a norm for each (``OWN_NORMS``), else only the last is.
    """
    if isinstance(model, OWN_NORMS):
        maps = model(images)
        return list(getattr(maps, 'feature_maps', maps))
    if isinstance(model, (SwinModel, Swinv2Model)):
        stages = model.encoder.layers
    else:
        stages = model.features[1::2] if isinstance(model, TorchvisionSwin) else model.layers
    maps = []

    def keep(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
        # transformers returns the map after merging, too.
        maps.append(output[1] if isinstance(output, tuple) else output)

    hooks = [stage.register_forward_hook(keep) for stage in stages]
    if isinstance(model, (SwinModel, Swinv2Model)):
        last = model(images).last_hidden_state
    elif isinstance(model, TorchvisionSwin):
        last = model.norm(model.features(images))
    else:
        last = model.forward_features(images)
    for hook in hooks:
        hook.remove()
    return [_channels_first(value) for value in [*maps[:3], last]]


def _channels_first(value: Tensor) -> Tensor:
    if value.ndim == 3:  # (B, N, C)
        side = round(value.shape[1] ** 0.5)
        value = value.unflatten(1, (side, side))
    return value.permute(0, 3, 1, 2)
