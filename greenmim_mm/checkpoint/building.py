"""How the model that a checkpoint is for is built: as arguments, and as a line of Python."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .architecture import Architecture

# timm's own sizes; what is none of them is built from its tiny one with other arguments.
_TIMM = {
    1: {
        'tiny': ('window7_224',),
        'small': ('window7_224',),
        'base': ('window7_224', 'window12_384'),
        'large': ('window7_224', 'window12_384'),
    },
    2: {
        'tiny': ('window8_256', 'window16_256'),
        'small': ('window8_256', 'window16_256'),
        'base': (
            'window8_256',
            'window16_256',
            'window12_192',
            'window12to16_192to256',
            'window12to24_192to384',
        ),
        'large': ('window12_192', 'window12to16_192to256', 'window12to24_192to384'),
    },
}
_TORCHVISION_WINDOWS = {1: 7, 2: 8}


@dataclass(frozen=True)
class Call:
    """A call that builds a model.

    Attributes:
        function: What is called; for configs of OpenMMLab ``dict``.
        arguments: By name.
        first: What stands before them, if anything.
    """

    function: str
    arguments: Mapping[str, Any]
    first: str | None = None

    def __str__(self) -> str:
        parts = [] if self.first is None else [repr(self.first)]
        parts += [f'{name}={_text(value)}' for name, value in self.arguments.items()]
        return f'{self.function}({", ".join(parts)})'


class _Code(str):
    """Python that stands in a call as it is."""


def build_line(
    architecture: Architecture,
    target: str,
    path: str | Path,
    state_dict: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
) -> str:
    """One line that builds the model which a file is for, with its parameters where it can.

    Args:
        architecture: The network in the file.
        target: Format of the file.
        path: The file.
        state_dict: The parameters in it, under its names.
        config: ``config.json`` beside them, if they are in a folder of transformers.

    Returns:
        The line, or in brackets why there is none.
    """
    path = str(path)
    if target == 'huggingface':
        if config is None:
            return '(transformers opens a folder with config.json)'
        names = config.get('architectures')
        name = names[0] if isinstance(names, list) and names else 'AutoModel'
        return f'transformers.{name}.from_pretrained({path!r})'
    classes = state_dict.get('head.fc.weight' if target == 'timm' else 'head.weight', ())
    try:
        call = build_call(architecture, target, len(classes))
    except ValueError as error:
        return f'({error})'
    if target == 'timm':
        call = replace(call, arguments={**call.arguments, 'checkpoint_path': path})
    elif call.function == 'dict':
        loaded = dict(type='Pretrained', checkpoint=path)
        # The others find it out by themselves.
        if 'mmpretrain' in call.arguments['type'] and any(k[:9] == 'backbone.' for k in state_dict):
            loaded['prefix'] = 'backbone.'
        call = replace(call, arguments={**call.arguments, 'init_cfg': loaded})
    elif target == 'torchvision':
        load = 'safetensors.torch.load_file' if path.endswith('.safetensors') else 'torch.load'
        head = '' if len(classes) else 'model.head = torch.nn.Identity(); '
        return f'model = {call}; {head}model.load_state_dict({load}({path!r}))'
    return str(call)


def build_call(
    architecture: Architecture,
    target: str,
    num_classes: int = 0,
    image_size: int | None = None,
) -> Call:
    """The call that builds the model of a format, without parameters.

    Args:
        architecture: The network.
        target: The format.
        num_classes: Classes of its classifier, where the model has one; 0 for none.
        image_size: Side of the images in pixels; None takes the one whose last map is one window.

    Raises:
        ValueError: If windows are not known, or the library has no such network.
    """
    arch = architecture
    if arch.window_sizes is None:
        raise ValueError('windows are not told; convert with --window-size first')
    side = image_size or 8 * arch.patch_size * arch.window_sizes[-1]
    if target == 'timm':
        return _timm(arch, num_classes, side, stock=image_size is None)
    if target == 'torchvision':
        return _torchvision(arch, num_classes, stock=image_size is None)
    if target == 'mmdet' and arch.version == 1:
        return _mmdet(arch)
    if target == 'mmpretrain':
        return _mmpretrain(arch, side)
    if target in ('greenmim_mm', 'mmdet'):  # mmdet has no Swin V2 of its own
        return _green_swin(arch)
    if target == 'greenmim':
        raise ValueError("the authors' programs build it from their own command line")
    return _microsoft(arch, target, num_classes, side)


def _sizes(arch: Architecture) -> dict[str, Any]:
    """As timm, Microsoft's code, detectron2 and torchvision call them."""
    return dict(embed_dim=arch.embed_dims, depths=arch.depths, num_heads=arch.num_heads)


def _unusual(arch: Architecture, **names: str) -> dict[str, Any]:
    """What is not as in every stock Swin, under the library's names for it."""
    usual = dict(patch_size=4, in_channels=3, mlp_ratio=4.0, qkv_bias=True)
    values = {name: getattr(arch, name) for name in usual}
    return {names.get(k, k): value for k, value in values.items() if value != usual[k]}


def _one_window(arch: Architecture, network: str) -> int:
    if arch.window_size is None:
        raise ValueError(
            f'{network} has one window size for all stages and this network has '
            f'{arch.window_sizes}; resize with --window-size'
        )
    return arch.window_size


def _outputs(arch: Architecture, default: tuple[int, ...]) -> dict[str, Any]:
    norms = arch.output_norms or (3,)
    return {} if norms == default else dict(out_indices=norms)


def _scale(arch: Architecture) -> dict[str, Any]:
    scale = arch.foreign_scale
    return {} if scale is None else dict(pretrained_window_sizes=scale)


def _green_swin(arch: Architecture) -> Call:
    arguments = dict(
        type='greenmim_mm.GreenSwin' + 'V2' * (arch.version == 2),
        arch=arch.name or arch.sizes,
        window_size=arch.window_size or arch.window_sizes,
    )
    return Call('dict', arguments | _unusual(arch) | _scale(arch) | _outputs(arch, (3,)))


def _mmdet(arch: Architecture) -> Call:
    name, more = 'mmdet.SwinTransformer', _unusual(arch)
    if 'patch_size' in more:
        more['strides'] = (arch.patch_size, 2, 2, 2)
    if arch.mlp_ratio == int(arch.mlp_ratio) and 'mlp_ratio' in more:
        # It multiplies channels by the ratio and needs an int.
        more['mlp_ratio'] = int(arch.mlp_ratio)
    sizes = arch.sizes | dict(window_size=_one_window(arch, name))
    return Call('dict', dict(type=name) | sizes | more | _outputs(arch, (0, 1, 2, 3)))


def _mmpretrain(arch: Architecture, side: int) -> Call:
    arguments: dict[str, Any] = dict(
        type='mmpretrain.SwinTransformer' + 'V2' * (arch.version == 2),
        arch=arch.name or arch.sizes,
        img_size=side,
    )
    more = _unusual(arch)
    ratio, bias = more.pop('mlp_ratio', None), more.pop('qkv_bias', None)
    if arch.version == 2:
        if (ratio, bias) != (None, None):
            raise ValueError('mmpretrain.SwinTransformerV2 has mlp_ratio 4 and qkv_bias alone')
        arguments['window_size'] = list(arch.window_sizes)
        if scale := _scale(arch):
            arguments['pretrained_window_sizes'] = list(scale['pretrained_window_sizes'])
    elif arch.window_size != 7 or (ratio, bias) != (None, None):
        stages = []
        for window, width in zip(arch.window_sizes, arch.widths, strict=True):
            block: dict[str, Any] = dict(window_size=window)
            if ratio is not None:
                block['ffn_cfgs'] = dict(feedforward_channels=int(ratio * width))
            if bias is not None:
                block['attn_cfgs'] = dict(qkv_bias=bias)
            stages.append(dict(block_cfgs=block))
        arguments['stage_cfgs'] = stages
    return Call('dict', arguments | more | _outputs(arch, (3,)))


def _timm(arch: Architecture, num_classes: int, side: int, stock: bool) -> Call:
    windows, scale = arch.window_sizes, arch.foreign_scale
    more = _unusual(arch, in_channels='in_chans')
    maps = [side // arch.patch_size >> stage for stage in range(len(windows))]
    # timm itself shrinks a window to a smaller map, and only new releases take one per stage.
    shrunk = all(w == min(windows[0], size) for w, size in zip(windows, maps, strict=True))
    prefix = {1: 'swin_{}_patch4_', 2: 'swinv2_{}_'}[arch.version]
    own = f'window{windows[0]}_{side}'
    if scale is not None:
        own = f'window{scale[0]}to{windows[0]}_{32 * scale[-1]}to{side}'
    known = _TIMM[arch.version]
    if stock and shrunk and not more and own in known.get(arch.name, ()):
        name = prefix.format(arch.name) + own
    else:
        name = prefix.format('tiny') + known['tiny'][0]
        sizes = dict(img_size=side, **_sizes(arch), window_size=windows[0] if shrunk else windows)
        more = sizes | more | _scale(arch)
    return Call('timm.create_model', dict(**more, num_classes=num_classes), name)


def _torchvision(arch: Architecture, num_classes: int, stock: bool) -> Call:
    more = _unusual(arch)
    if more.keys() & {'in_channels', 'qkv_bias'}:
        raise ValueError('torchvision has Swins for images of 3 channels and with qkv_bias alone')
    window = _one_window(arch, 'torchvision')
    classes = dict(num_classes=num_classes) if num_classes else {}
    if stock and arch.name in ('tiny', 'small', 'base') and not more:
        if window == _TORCHVISION_WINDOWS[arch.version]:
            name = f'swin_{"v2_" * (arch.version == 2)}{arch.name[0]}'
            return Call(f'torchvision.models.{name}', classes)
    module = 'torchvision.models.swin_transformer'
    # It takes lists.
    more.pop('patch_size', None)
    sizes = {key: list(v) if isinstance(v, tuple) else v for key, v in _sizes(arch).items()}
    sizes = dict(patch_size=[arch.patch_size] * 2, **sizes, window_size=[window] * 2)
    more |= classes
    if arch.version == 2:
        more['block'] = _Code(f'{module}.SwinTransformerBlockV2')
        more['downsample_layer'] = _Code(f'{module}.PatchMergingV2')
    return Call(f'{module}.SwinTransformer', sizes | more)


def _microsoft(arch: Architecture, target: str, num_classes: int, side: int) -> Call:
    more = _unusual(arch, in_channels='in_chans')
    if target == 'detectron2':
        name = 'detectron2.modeling.SwinTransformer'
        sizes = _sizes(arch) | dict(window_size=_one_window(arch, name))
        return Call(name, sizes | more | _outputs(arch, (0, 1, 2, 3)))
    sizes = dict(img_size=side, **_sizes(arch), window_size=arch.window_sizes[0])
    more |= _scale(arch) | dict(num_classes=num_classes)
    return Call('SwinTransformer' + 'V2' * (arch.version == 2), sizes | more)


def _text(value: Any) -> str:
    if isinstance(value, _Code):
        return str(value)
    if isinstance(value, dict):
        return f'dict({", ".join(f"{key}={_text(item)}" for key, item in value.items())})'
    if isinstance(value, list):
        return f'[{", ".join(map(_text, value))}]'
    return repr(value)
