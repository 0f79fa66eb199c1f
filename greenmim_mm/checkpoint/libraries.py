"""The networks of the libraries that checkpoints are for, each built for one file.

The libraries are imported when they are needed; the rest of this package does without them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from .architecture import Architecture, infer_architecture
from .convert import canonical_state_dict
from .files import load_checkpoint


class VerificationError(ValueError):
    """A file does not hold the network that it should."""


@dataclass(frozen=True)
class Model:
    """A network and the modules whose outputs are compared, by name."""

    network: str
    module: nn.Module
    places: Mapping[str, nn.Module]
    pad_small_map: bool = False
    independent: bool = True

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """Outputs ``(B, N, C)`` of the places, tokens row by row."""
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                value = output if isinstance(output, Tensor) else output[0]
                found[name] = value.reshape(len(images), -1, value.shape[-1])

            return hook

        handles = [module.register_forward_hook(keep(n)) for n, module in self.places.items()]
        try:
            self.module.float()
            self.module.eval()  # mmdet's returns nothing
            self.module(images)
        finally:
            for handle in handles:
                handle.remove()
        return found


def _import(name: str, package: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f'--verify needs the package {package}, which cannot be imported ({error}); install it '
            f'or leave the check out'
        ) from error


def _one_window(architecture: Architecture, network: str) -> int:
    if architecture.window_size is None:
        raise ValueError(
            f'{network} has one window size for all stages and this network has '
            f'{architecture.window_sizes}; resize with --window-size'
        )
    return architecture.window_size


def _openmmlab_places(module: nn.Module, architecture: Architecture) -> dict[str, nn.Module]:
    """Blocks and norms have the same names in mmdet and mmpretrain."""
    stages = {f'stage {i}': stage.blocks[-1] for i, stage in enumerate(module.stages)}
    return stages | {f'norm {i}': getattr(module, f'norm{i}') for i in architecture.output_norms}


def green_swin(
    canonical: Mapping[str, Tensor],
    architecture: Architecture,
    pad_small_map: bool,
    with_buffers: bool = False,
) -> Model:
    """GreenSwin with these parameters, and with these buffers or its own."""
    models = _import('greenmim_mm.models', 'mmengine')
    arch: dict[str, Any] = dict(
        embed_dims=architecture.embed_dims,
        depths=architecture.depths,
        num_heads=architecture.num_heads,
    )
    kind, options = models.GreenSwin, {}
    if architecture.version == 2:
        kind = models.GreenSwinV2
        arch['extra_norm_every_n_blocks'] = architecture.extra_norm_every
        options['pretrained_window_sizes'] = _pretrained(architecture)
    module = kind(
        arch,
        in_channels=architecture.in_channels,
        window_size=architecture.window_sizes,
        mlp_ratio=architecture.mlp_ratio,
        qkv_bias=architecture.qkv_bias,
        out_indices=architecture.output_norms or (3,),
        pad_small_map=pad_small_map,
        **options,
    )
    own = module.state_dict()
    buffers = {name for name, _ in module.named_buffers()}
    norms = () if architecture.output_norms else ('norm3.weight', 'norm3.bias')
    state_dict = {key: value for key, value in canonical.items() if key in own}
    # Other formats have other buffers, or none; they follow from the window size.
    kept = (*norms,) if with_buffers else (*norms, *buffers)
    module.load_state_dict(state_dict | {key: own[key] for key in kept})
    places = {f'stage {i}': stage for i, stage in enumerate(module.stages)}
    places |= {f'norm {i}': getattr(module, f'norm{i}') for i in architecture.output_norms}
    return Model(kind.__name__, module, places, pad_small_map)


def converted_back(path: Path, target: str, architecture: Architecture, side: int) -> Model:
    """For formats whose code is in no package, or this one."""
    canonical = canonical_state_dict(load_checkpoint(path, mmap=True).state_dict, target)
    found = infer_architecture(canonical)
    if not found.pretraining_told:
        found = replace(
            found,
            window_sizes=architecture.window_sizes,
            pretrained_window_sizes=architecture.pretrained_window_sizes,
        )
    own = target == 'greenmim_mm'
    model = green_swin(canonical, found, pad_small_map=False, with_buffers=own)
    return Model(model.network, model.module, model.places, independent=own)


def _backbone(path: Path) -> dict[str, Tensor]:
    """Parameters of the backbone in a file of OpenMMLab's."""
    state_dict = load_checkpoint(path, mmap=True).state_dict
    prefix = 'backbone.'
    return {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}


def _mmdet(path: Path, target: str, architecture: Architecture, side: int) -> Model:
    swin = _import('mmdet.models.backbones.swin', 'mmdet').SwinTransformer
    module = swin(
        pretrain_img_size=side,
        in_channels=architecture.in_channels,
        embed_dims=architecture.embed_dims,
        patch_size=architecture.patch_size,
        window_size=_one_window(architecture, 'mmdet.SwinTransformer'),
        mlp_ratio=_whole(architecture.mlp_ratio),
        depths=architecture.depths,
        num_heads=architecture.num_heads,
        strides=(architecture.patch_size, 2, 2, 2),
        out_indices=architecture.output_norms,
        qkv_bias=architecture.qkv_bias,
    )
    module.load_state_dict(_backbone(path))
    places = _openmmlab_places(module, architecture)
    return Model('mmdet.SwinTransformer', module, places, pad_small_map=True)


def _mmpretrain(path: Path, target: str, architecture: Architecture, side: int) -> Model:
    swin = _import('mmpretrain.models.backbones', 'mmpretrain').SwinTransformer
    stages = [
        dict(
            block_cfgs=dict(
                window_size=window,
                ffn_cfgs=dict(feedforward_channels=int(architecture.mlp_ratio * width)),
                attn_cfgs=dict(qkv_bias=architecture.qkv_bias),
            )
        )
        for window, width in zip(architecture.window_sizes, architecture.widths, strict=True)
    ]
    module = swin(
        arch=_lists(architecture),
        img_size=side,
        patch_size=architecture.patch_size,
        in_channels=architecture.in_channels,
        out_indices=architecture.output_norms,
        stage_cfgs=stages,
    )
    module.load_state_dict(_backbone(path))
    return Model('mmpretrain.SwinTransformer', module, _openmmlab_places(module, architecture))


def _mmpretrain_v2(path: Path, target: str, architecture: Architecture, side: int) -> Model:
    swin = _import('mmpretrain.models.backbones', 'mmpretrain').SwinTransformerV2
    module = swin(
        arch={
            **_lists(architecture),
            'extra_norm_every_n_blocks': architecture.extra_norm_every,
        },
        img_size=side,
        patch_size=architecture.patch_size,
        in_channels=architecture.in_channels,
        window_size=list(architecture.window_sizes),
        out_indices=architecture.output_norms,
        pretrained_window_sizes=list(_pretrained(architecture)),
    )
    # While loading it takes its buffers out of the file's parameters and keeps its own.
    buffers = {name for name, _ in module.named_buffers()}
    keys = module.load_state_dict(_backbone(path), strict=False)
    if wrong := [*(set(keys.missing_keys) - buffers), *keys.unexpected_keys]:
        raise VerificationError(f'mmpretrain.SwinTransformerV2 does not accept the file: {wrong}')
    return Model('mmpretrain.SwinTransformerV2', module, _openmmlab_places(module, architecture))


def _timm(path: Path, target: str, architecture: Architecture, side: int) -> Model:
    version = architecture.version
    name = 'swin_transformer' if version == 1 else 'swin_transformer_v2'
    module_of = _import(f'timm.models.{name}', 'timm')
    kind = module_of.SwinTransformer if version == 1 else module_of.SwinTransformerV2
    windows = architecture.window_sizes
    maps = [side // architecture.patch_size >> stage for stage in range(len(windows))]
    # timm itself shrinks a window to a smaller map, and only new releases take one per stage.
    shrunk = all(w == min(windows[0], size) for w, size in zip(windows, maps, strict=True))
    options: dict[str, Any] = dict(qkv_bias=architecture.qkv_bias)
    if version == 2:
        options['pretrained_window_sizes'] = _pretrained(architecture)
    module = kind(
        img_size=side,
        patch_size=architecture.patch_size,
        in_chans=architecture.in_channels,
        num_classes=_num_classes(load_checkpoint(path, mmap=True).state_dict, 'head.fc.weight'),
        embed_dim=architecture.embed_dims,
        depths=architecture.depths,
        num_heads=architecture.num_heads,
        window_size=windows[0] if shrunk else windows,
        mlp_ratio=architecture.mlp_ratio,
        **options,
    )
    # The loader behind timm.create_model(..., checkpoint_path=...).
    _import('timm.models', 'timm').load_checkpoint(module, str(path))
    places = {f'stage {i}': layer for i, layer in enumerate(module.layers)}
    return Model(f'timm {kind.__name__}', module, places | {'norm 3': module.norm})


def _huggingface(path: Path, target: str, architecture: Architecture, side: int) -> Model:
    transformers = _import('transformers', 'transformers')
    name = load_checkpoint(path, mmap=True).config['architectures'][0]
    model, info = getattr(transformers, name).from_pretrained(
        path, local_files_only=True, output_loading_info=True
    )
    if wrong := {key: value for key, value in info.items() if value}:
        raise VerificationError(f'transformers.{name} does not accept the file: {wrong}')
    module = getattr(model, model.base_model_prefix, model)
    places = {f'stage {i}': layer.blocks[-1] for i, layer in enumerate(module.encoder.layers)}
    if hasattr(module, 'layernorm'):
        places['norm 3'] = module.layernorm
    for stage, norm in getattr(module, 'hidden_states_norms', {}).items():
        places[f'norm {int(stage.removeprefix("stage")) - 1}'] = norm
    # As a backbone V1 shifts even what is a single window.
    padded = name == 'SwinBackbone'
    return Model(f'transformers.{name}', module, places, pad_small_map=padded)


def _torchvision(path: Path, target: str, architecture: Architecture, side: int) -> Model:
    swin = _import('torchvision.models.swin_transformer', 'torchvision')
    if architecture.in_channels != 3 or not architecture.qkv_bias:
        raise ValueError('torchvision has Swins for images of 3 channels and with qkv_bias alone')
    window = _one_window(architecture, 'torchvision')
    state_dict = load_checkpoint(path, mmap=True).state_dict
    options: dict[str, Any] = {}
    if architecture.version == 2:
        options = dict(block=swin.SwinTransformerBlockV2, downsample_layer=swin.PatchMergingV2)
    num_classes = _num_classes(state_dict, 'head.weight')
    module = swin.SwinTransformer(
        patch_size=[architecture.patch_size] * 2,
        embed_dim=architecture.embed_dims,
        depths=list(architecture.depths),
        num_heads=list(architecture.num_heads),
        window_size=[window] * 2,
        mlp_ratio=architecture.mlp_ratio,
        num_classes=num_classes or 1,
        **options,
    )
    if not num_classes:
        module.head = nn.Identity()
    module.load_state_dict(state_dict)
    places = {f'stage {i}': module.features[2 * i + 1] for i in range(len(architecture.depths))}
    return Model('torchvision SwinTransformer', module, places | {'norm 3': module.norm})


def _num_classes(state_dict: Mapping[str, Tensor], key: str) -> int:
    return len(state_dict[key]) if key in state_dict else 0


def _pretrained(architecture: Architecture) -> tuple[int, ...]:
    """Windows of V2's pre-training as the libraries take them: 0 for those in use."""
    return architecture.pretrained_window_sizes or (0,) * len(architecture.depths)


def _whole(value: float) -> float | int:
    """mmdet multiplies channels by the ratio and needs an int."""
    return int(value) if value == int(value) else value


def _lists(architecture: Architecture) -> dict[str, Any]:
    return dict(
        embed_dims=architecture.embed_dims,
        depths=list(architecture.depths),
        num_heads=list(architecture.num_heads),
    )


LIBRARIES: Mapping[tuple[str, int], Callable[[Path, str, Architecture, int], Model]] = {
    ('mmdet', 1): _mmdet,
    ('mmpretrain', 1): _mmpretrain,
    ('mmpretrain', 2): _mmpretrain_v2,
    ('timm', 1): _timm,
    ('timm', 2): _timm,
    ('huggingface', 1): _huggingface,
    ('huggingface', 2): _huggingface,
    ('torchvision', 1): _torchvision,
    ('torchvision', 2): _torchvision,
}
