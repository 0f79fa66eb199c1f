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

from ..checkpoint import Architecture, Call, build_call, load_checkpoint, read_network
from ..models import GreenSwin, GreenSwinV2


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
    kind = GreenSwin if architecture.version == 1 else GreenSwinV2
    module = kind(**_config(build_call(architecture, 'greenmim_mm')), pad_small_map=pad_small_map)
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
    network = read_network(path, target)
    found, own = network.architecture, target == 'greenmim_mm'
    if not found.scale_is_known:
        found = replace(
            found,
            window_sizes=architecture.window_sizes,
            pretrained_window_sizes=architecture.pretrained_window_sizes,
        )
    model = green_swin(network.state_dict, found, pad_small_map=False, with_buffers=own)
    return replace(model, independent=own)


def _backbone(path: Path) -> dict[str, Tensor]:
    """Parameters of the backbone in a file of OpenMMLab's."""
    state_dict = load_checkpoint(path, mmap=True).state_dict
    prefix = 'backbone.'
    return {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}


def _config(call: Call) -> dict[str, Any]:
    """Arguments of the class that a config names."""
    return {key: value for key, value in call.arguments.items() if key != 'type'}


def _mmdet(path: Path, target: str, architecture: Architecture, side: int) -> Model:
    swin = _import('mmdet.models.backbones.swin', 'mmdet').SwinTransformer
    module = swin(**_config(build_call(architecture, target)), pretrain_img_size=side)
    module.load_state_dict(_backbone(path))
    places = _openmmlab_places(module, architecture)
    return Model('mmdet.SwinTransformer', module, places, pad_small_map=True)


def _mmpretrain(path: Path, target: str, architecture: Architecture, side: int) -> Model:
    call = build_call(architecture, target, image_size=side)
    name = call.arguments['type']
    kind = getattr(_import('mmpretrain.models.backbones', 'mmpretrain'), name.split('.')[1])
    module = kind(**_config(call))
    # While loading V2 takes its buffers out of the file's parameters and keeps its own.
    buffers = {key for key, _ in module.named_buffers()} if architecture.version == 2 else set()
    keys = module.load_state_dict(_backbone(path), strict=architecture.version == 1)
    if wrong := [*(set(keys.missing_keys) - buffers), *keys.unexpected_keys]:
        raise VerificationError(f'{name} does not accept the file: {wrong}')
    return Model(name, module, _openmmlab_places(module, architecture))


def _timm(path: Path, target: str, architecture: Architecture, side: int) -> Model:
    timm = _import('timm', 'timm')
    classes = _num_classes(load_checkpoint(path, mmap=True).state_dict, 'head.fc.weight')
    call = build_call(architecture, target, classes, side)
    module = timm.create_model(call.first, **call.arguments, checkpoint_path=str(path))
    places = {f'stage {i}': layer for i, layer in enumerate(module.layers)}
    return Model(f'timm {type(module).__name__}', module, places | {'norm 3': module.norm})


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
    state_dict = load_checkpoint(path, mmap=True).state_dict
    classes = _num_classes(state_dict, 'head.weight')
    call = build_call(architecture, target, classes, side)
    parts = {}
    if architecture.version == 2:
        parts = dict(block=swin.SwinTransformerBlockV2, downsample_layer=swin.PatchMergingV2)
    module = swin.SwinTransformer(**{**call.arguments, **parts})
    if not classes:
        module.head = nn.Identity()
    module.load_state_dict(state_dict)
    places = {f'stage {i}': module.features[2 * i + 1] for i in range(len(architecture.depths))}
    return Model('torchvision SwinTransformer', module, places | {'norm 3': module.norm})


def _num_classes(state_dict: Mapping[str, Tensor], key: str) -> int:
    return len(state_dict[key]) if key in state_dict else 0


LIBRARIES: Mapping[tuple[str, int], Callable[[Path, str, Architecture, int], Model]] = {
    ('mmdet', 1): _mmdet,
    ('mmpretrain', 1): _mmpretrain,
    ('mmpretrain', 2): _mmpretrain,
    ('timm', 1): _timm,
    ('timm', 2): _timm,
    ('huggingface', 1): _huggingface,
    ('huggingface', 2): _huggingface,
    ('torchvision', 1): _torchvision,
    ('torchvision', 2): _torchvision,
}
