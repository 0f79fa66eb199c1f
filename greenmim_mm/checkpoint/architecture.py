"""What a Swin looks like, read off the shapes of its parameters."""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..archs import SWIN_ARCHS, SWINV2_ARCHS
from ..compat import extremes
from ..ops import coords_windows
from .layouts import BUFFERS, COORDS, INDEX, TABLE, Transform, written_shapes
from .reading import CheckpointError

NUM_STAGES = 4
# Buffers grow with the fourth power of it; no network in use comes near.
MAX_WINDOW = 64
_BLOCK_KEY = re.compile(r'stages\.(\d{1,3})\.blocks\.(\d{1,4})\.(.+)')
_ATTN = 'attn.w_msa.'
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Architecture:
    """Sizes of a Swin.

    Attributes:
        version: 1, or 2 (post-norm, cosine attention, bias from an MLP of the offsets).
        embed_dims: Channels of the first stage; each further stage has twice as many.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        window_sizes: Side of the windows of each stage in tokens; None where nothing tells it (V2
            files without buffers).
        mlp_ratio: Width of the MLPs over the stage's channels.
        qkv_bias: Whether queries, keys and values have a bias (V2: queries and values).
        in_channels: Channels of the image.
        patch_size: Side of a patch in pixels.
        output_norms: Stages whose output has a norm.
        bias_hidden: Hidden channels of the MLP that makes V2's bias; 0 in V1.
        extra_norm_every: Every so many blocks one ends with one more norm (the largest V2); or 0.
        pretrained_window_sizes: Windows of the pre-training, by which V2 scales offsets, whether
            or not they are ``window_sizes``; None where nothing tells them, and in V1.
        first_merging: Stage that holds the first patch merging: 0 (behind its blocks, as in V1),
            or 1 (before its blocks, as in mmpretrain's V2).
    """

    version: int
    embed_dims: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window_sizes: tuple[int, ...] | None
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    in_channels: int = 3
    patch_size: int = 4
    output_norms: tuple[int, ...] = (3,)
    bias_hidden: int = 0
    extra_norm_every: int = 0
    pretrained_window_sizes: tuple[int, ...] | None = None
    first_merging: int = 0

    @property
    def sizes(self) -> dict[str, Any]:
        """What OpenMMLab's backbones take for ``arch``."""
        sizes = dict(embed_dims=self.embed_dims, depths=self.depths, num_heads=self.num_heads)
        if self.version == 2:
            sizes['extra_norm_every_n_blocks'] = self.extra_norm_every
        return sizes

    @property
    def name(self) -> str | None:
        """'tiny', 'small', 'base', 'large', 'huge' or 'giant'; None for other sizes."""
        archs = SWIN_ARCHS if self.version == 1 else SWINV2_ARCHS
        return next((name for name, sizes in archs.items() if sizes == self.sizes), None)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.embed_dims << stage for stage in range(len(self.depths)))

    @property
    def window_size(self) -> int | None:
        """The window size of all stages; None if they differ or are not known."""
        sizes = set(self.window_sizes or ())
        return sizes.pop() if len(sizes) == 1 else None

    @property
    def scale_is_known(self) -> bool:
        """Whether it is known by which windows offsets are scaled; V1 has no such scale."""
        return self.version == 1 or self.pretrained_window_sizes is not None

    @property
    def foreign_scale(self) -> tuple[int, ...] | None:
        """Windows of V2's pre-training if they are others than those in use; else None."""
        sizes = self.pretrained_window_sizes
        return None if sizes == self.window_sizes else sizes

    def with_window(self, window_size: int | Sequence[int]) -> 'Architecture':
        """The same network with other windows; those of the pre-training stay.

        Raises:
            ValueError: See :func:`check_window_size`.
        """
        return replace(self, window_sizes=check_window_size(window_size))

    def describe(self) -> str:
        """One line: name, version and sizes."""
        windows = 'unknown' if self.window_sizes is None else _joined(self.window_sizes)
        return (
            f'Swin V{self.version} {self.name or "of its own size"}: embed_dims '
            f'{self.embed_dims}, depths {_joined(self.depths)}, heads {_joined(self.num_heads)}, '
            f'window {windows}, mlp_ratio {self.mlp_ratio:g}'
        )


def check_window_size(
    window_size: int | Sequence[int], name: str = 'window_size'
) -> tuple[int, ...]:
    """One window size a stage.

    Raises:
        ValueError: If a size is not positive or beyond ``MAX_WINDOW``, or there is not one for
            each stage.
    """
    several = isinstance(window_size, Sequence) and not isinstance(window_size, str)
    sizes = tuple(window_size) if several else (window_size,) * NUM_STAGES
    # bool is an int to Python.
    if len(sizes) != NUM_STAGES or any(type(size) is not int or size < 1 for size in sizes):
        raise ValueError(
            f'{name}={window_size} must be a positive integer or {NUM_STAGES} of them, one per '
            'stage'
        )
    if max(sizes) > MAX_WINDOW:
        raise ValueError(f'{name}={window_size} is too large; windows have at most {MAX_WINDOW}')
    return sizes


def infer_architecture(
    state_dict: Mapping[str, Tensor],
    spell: Callable[[str], str | None] = str,
    transforms: Sequence[Transform] = (),
) -> Architecture:
    """Read the architecture off a state dict and check every parameter against it.

    Args:
        state_dict: Parameters under canonical names, ``stages.0.blocks.0...``; parts of other
            models than a Swin are passed over.
        spell: For messages, makes the name in the file of a canonical one.
        transforms: Those by which parts of ``state_dict`` have yet to be read.

    Returns:
        The architecture. Sizes are those on which most layers agree, so that one wrong layer is
        named as such.

    Raises:
        CheckpointError: If this is no Swin, parameters are lacking, or one has a shape that does
            not go with the others; the message names it and the shape that it should have.
    """

    def named(key: str) -> str:
        return spell(key) or key

    backbone = re.compile(r'patch_embed\.|stages\.|norm\d\.')
    own = {key: value for key, value in state_dict.items() if backbone.match(key)}
    if not any(map(_BLOCK_KEY.fullmatch, own)):
        raise CheckpointError(
            f'this is no Swin: none of {len(state_dict)} keys belongs to a block; first keys: '
            f'{[named(key) for key in list(state_dict)[:3]]}'
        )
    architecture = _guess(own)
    shapes = written_shapes(parameter_shapes(architecture), transforms)
    _check_keys(own, shapes, architecture, named)
    shapes |= written_shapes(_buffer_shapes(own, architecture), transforms)
    shapes |= _other_shapes(state_dict, architecture)
    for key, value in state_dict.items():
        expected = shapes.get(key)
        if expected is not None and tuple(value.shape) != expected:
            raise CheckpointError(
                f'{named(key)} has shape {tuple(value.shape)}; by the other layers it should be '
                f'{expected} ({architecture.describe()})'
            )
    leaf = TABLE if architecture.version == 1 else 'logit_scale'
    sizes = zip(architecture.widths, architecture.num_heads, strict=True)
    for stage, (width, heads) in enumerate(sizes):
        if heads < 1 or width % heads:
            key = f'stages.{stage}.blocks.0.{_ATTN}{leaf}'
            raise CheckpointError(
                f'{named(key)} has shape {tuple(own[key].shape)} for {heads} heads; it should be '
                f'for a number of heads that divides the {width} channels of the stage'
            )
    if architecture.version == 2:
        pretrained = _pretrained_windows(own)
        architecture = replace(architecture, pretrained_window_sizes=pretrained)
    return architecture


def parameter_shapes(architecture: Architecture) -> Shapes:
    """Canonical name and shape of each parameter of the backbone, output norms included."""
    arch, patch = architecture, architecture.patch_size
    shapes = _layer('patch_embed.projection', arch.embed_dims, arch.in_channels, patch, patch)
    shapes |= _layer('patch_embed.norm', arch.embed_dims)
    for stage, (width, depth) in enumerate(zip(arch.widths, arch.depths, strict=True)):
        block = _block_shapes(arch, stage)
        for index in range(depth):
            prefix = f'stages.{stage}.blocks.{index}.'
            shapes |= {prefix + leaf: shape for leaf, shape in block.items()}
            if arch.extra_norm_every and (index + 1) % arch.extra_norm_every == 0:
                shapes |= _layer(prefix + 'norm3', width)
        if stage < len(arch.depths) - 1:
            prefix = f'stages.{stage + arch.first_merging}.downsample.'
            # V1 normalises before the merging, V2 after it.
            shapes |= _layer(prefix + 'norm', (4 if arch.version == 1 else 2) * width)
            shapes |= _layer(prefix + 'reduction', 2 * width, 4 * width, bias=False)
        if stage in arch.output_norms:
            shapes |= _layer(f'norm{stage}', width)
    return shapes


def check_finite(state_dict: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not numbers.

    Raises:
        CheckpointError: If a tensor holds NaN or infinity; the message names the first one.
    """
    bad = [key for key, value in state_dict.items() if not _is_finite(value)]
    if bad:
        value = state_dict[bad[0]]
        num_nan = int(value.isnan().sum())
        num_inf = int((~value.isfinite()).sum()) - num_nan
        more = f', and {len(bad) - 1} more tensors are not finite either' if len(bad) > 1 else ''
        raise CheckpointError(
            f'{bad[0]} has {num_nan} NaN and {num_inf} infinite of {value.numel()} values{more}'
        )


def _is_finite(value: Tensor) -> bool:
    if not value.is_floating_point() or value.numel() == 0:
        return True
    if value.element_size() == 1:  # float8 has no arithmetic of its own
        value = value.float()
    # One pass without a temporary tensor; NaN wins over any number.
    return all(bool(torch.isfinite(limit)) for limit in extremes(value))


def _buffer_shapes(own: Collection[str], arch: Architecture) -> Shapes:
    """Of the buffers by which a Swin V2 tells its windows; others can be made anew."""
    if arch.version == 1 or arch.window_sizes is None:
        return {}
    leaf = COORDS if any(key.endswith(COORDS) for key in own) else INDEX
    shapes: Shapes = {}
    for stage, (window, depth) in enumerate(zip(arch.window_sizes, arch.depths, strict=True)):
        side = 2 * window - 1
        shape = (1, side, side, 2) if leaf == COORDS else (window**2, window**2)
        shapes |= {f'stages.{stage}.blocks.{block}.{_ATTN}{leaf}': shape for block in range(depth)}
    return shapes


def _other_shapes(state_dict: Mapping[str, Tensor], arch: Architecture) -> Shapes:
    """Of what goes with a backbone."""
    sizes = {key: value.shape for key, value in state_dict.items()}
    weight, bias = sizes.get('head.fc.weight', ()), sizes.get('head.fc.bias', ())
    classes = weight[0] if len(weight) == 2 else math.prod(bias)
    positions = sizes.get('absolute_pos_embed', ())
    return {
        'head.fc.weight': (classes, arch.widths[-1]),
        'head.fc.bias': (classes,),
        'mask_token': (1, 1, arch.embed_dims),
        'absolute_pos_embed': (1, positions[1] if len(positions) > 1 else 1, arch.embed_dims),
    }


def _block_shapes(arch: Architecture, stage: int) -> Shapes:
    width, heads, hidden = arch.widths[stage], arch.num_heads[stage], arch.bias_hidden
    joint_bias = arch.version == 1 and arch.qkv_bias
    shapes = _layer('norm1', width) | _layer('norm2', width)
    shapes |= _layer(_ATTN + 'qkv', 3 * width, width, bias=joint_bias)
    if arch.version == 2:
        shapes[_ATTN + 'logit_scale'] = (heads, 1, 1)
        shapes |= _layer(_ATTN + 'cpb_mlp.0', hidden, 2)
        shapes |= _layer(_ATTN + 'cpb_mlp.2', heads, hidden, bias=False)
        if arch.qkv_bias:
            shapes[_ATTN + 'q_bias'] = shapes[_ATTN + 'v_bias'] = (width,)
    elif arch.window_sizes is not None:
        shapes[_ATTN + TABLE] = ((2 * arch.window_sizes[stage] - 1) ** 2, heads)
    shapes |= _layer(_ATTN + 'proj', width, width)
    shapes |= _layer('ffn.layers.0.0', int(arch.mlp_ratio * width), width)
    return shapes | _layer('ffn.layers.1', width, int(arch.mlp_ratio * width))


def _layer(name: str, *weight: int, bias: bool = True) -> Shapes:
    """Of a norm, a linear layer or a convolution."""
    return {f'{name}.weight': weight} | ({f'{name}.bias': weight[:1]} if bias else {})


def _guess(own: Mapping[str, Tensor]) -> Architecture:
    """The architecture on which most layers agree."""
    leaves: dict[tuple[int, str], list[tuple[int, ...]]] = {}
    blocks: list[set[int]] = [set() for _ in range(NUM_STAGES)]
    for key, value in own.items():
        match = _BLOCK_KEY.fullmatch(key)
        if match and int(match[1]) < NUM_STAGES:
            blocks[int(match[1])].add(int(match[2]))
            leaves.setdefault((int(match[1]), match[3]), []).append(tuple(value.shape))

    def sizes(leaf: str, axis: int, ndim: int, stage: int | None = None) -> list[tuple[int, int]]:
        """(stage, length of the axis) of every such parameter that has ``ndim`` axes."""
        stages = range(NUM_STAGES) if stage is None else (stage,)
        return [
            (s, shape[axis])
            for s in stages
            for shape in leaves.get((s, leaf), ())
            if len(shape) == ndim
        ]

    version = 2 if any(leaf.startswith(_ATTN + 'logit_scale') for _, leaf in leaves) else 1
    widths = [
        size >> stage
        for leaf, ndim in (('norm1.weight', 1), ('norm2.weight', 1), (_ATTN + 'proj.weight', 2))
        for stage, size in sizes(leaf, 0, ndim)
    ]
    embed_dims = max(_vote(widths, 1), 1)
    heads_leaf = (_ATTN + TABLE, 1, 2) if version == 1 else (_ATTN + 'logit_scale', 0, 3)
    projection = own.get('patch_embed.projection.weight')
    has_patches = projection is not None and projection.ndim == 4
    # Of one layer, of three, or V2's.
    biases = ('qkv.bias', 'q.bias', 'k.bias', 'v.bias', 'q_bias', 'v_bias')
    return Architecture(
        version=version,
        embed_dims=embed_dims,
        # The highest number is not trusted: a file could claim a million blocks.
        depths=tuple(max(len(numbers), 1) for numbers in blocks),
        num_heads=tuple(
            _vote((size for _, size in sizes(*heads_leaf, stage)), 1) for stage in range(NUM_STAGES)
        ),
        window_sizes=_windows(leaves, version),
        mlp_ratio=_vote(
            (size / (embed_dims << stage) for stage, size in sizes('ffn.layers.0.0.weight', 0, 2)),
            4.0,
        ),
        qkv_bias=any(leaf == _ATTN + name for _, leaf in leaves for name in biases),
        in_channels=projection.shape[1] if has_patches else 3,
        patch_size=projection.shape[3] if has_patches else 4,
        output_norms=tuple(s for s in range(NUM_STAGES) if f'norm{s}.weight' in own),
        bias_hidden=_vote((size for _, size in sizes(_ATTN + 'cpb_mlp.0.weight', 0, 2)), 0),
        extra_norm_every=min(
            (int(key.split('.')[3]) + 1 for key in own if key.endswith('.norm3.weight')), default=0
        ),
        first_merging=int('stages.3.downsample.reduction.weight' in own),
    )


def _windows(
    leaves: Mapping[tuple[int, str], list[tuple[int, ...]]], version: int
) -> tuple[int, ...] | None:
    """Windows of the stages, from tables (V1) or from buffers (V2)."""
    windows = []
    for stage in range(NUM_STAGES):
        tables, coords, indices = (
            leaves.get((stage, _ATTN + leaf), ()) for leaf in (TABLE, COORDS, INDEX)
        )
        if version == 1:
            # The nearest window; whether it is the table's is checked with all shapes.
            found = [round((shape[0] ** 0.5 + 1) / 2) for shape in tables if len(shape) == 2]
        else:
            found = [(shape[1] + 1) // 2 for shape in coords if len(shape) == 4]
            found = found or [round(math.prod(shape) ** 0.25) for shape in indices]
            if not found:
                return None
        windows.append(max(_vote(found, 1), 1))
    return tuple(windows)


def _pretrained_windows(own: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    """Windows in pre-training that V2's buffers tell; None without buffers."""
    keys = [f'stages.{stage}.blocks.0.{_ATTN}{COORDS}' for stage in range(NUM_STAGES)]
    if any(key not in own for key in keys):
        return None
    try:
        return tuple(coords_windows(own[key])[1] for key in keys)
    except OverflowError as error:
        raise CheckpointError(f'{keys[0]} and its like hold no offsets of a Swin V2') from error


def _check_keys(
    own: Collection[str], shapes: Shapes, arch: Architecture, named: Callable[[str], str]
) -> None:
    missing = [key for key in shapes if key not in own]
    # Of a single norm the other half may be missing, of a bias the bias of another layer.
    extra = [key for key in own if key not in shapes and not key.endswith(BUFFERS)]
    fit = f'{len(shapes) - len(missing)} of {len(shapes)} parameters of a {_brief(arch)} are there'
    if missing:
        raise CheckpointError(
            f'this is no whole Swin: {fit}, but {len(missing)} are lacking, e.g. '
            f'{named(missing[0])}'
        )
    if extra:
        raise CheckpointError(
            f'this is another architecture than a {_brief(arch)}, which has no '
            f'{named(extra[0])} ({len(extra)} such keys)'
        )


def _brief(arch: Architecture) -> str:
    return f'Swin V{arch.version} with depths {_joined(arch.depths)}'


def _vote(values: Iterable, default):
    """The most frequent value."""
    return next((value for value, _ in Counter(values).most_common(1)), default)


def _joined(values: Sequence[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else '-'.join(map(str, values))
