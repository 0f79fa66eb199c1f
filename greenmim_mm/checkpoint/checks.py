"""Whether parameters are those of a whole Swin: names and shapes."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from .layout import Format, Layout
from .transforms import Entry

_STAGE = re.compile(r'(?:stages\.|norm)([0-3])\.')
_BLOCK = re.compile(r'stages\.([0-3])\.blocks\.(\d+)\.(.+)')

# Shapes by the end of the name. C is the stage's number of channels; other letters are sizes of
# which nothing is known but that they are the same wherever they occur in a stage: H hidden
# channels, N heads, T rows of the bias table, M hidden channels of the position network, K
# classes. A star stands for any number.
_BLOCK_SHAPES = {
    'norm1.weight': 'C',
    'norm1.bias': 'C',
    'attn.w_msa.qkv.weight': '3C C',
    'attn.w_msa.proj.weight': 'C C',
    'attn.w_msa.proj.bias': 'C',
    'norm2.weight': 'C',
    'norm2.bias': 'C',
    'ffn.layers.0.0.weight': 'H C',
    'ffn.layers.0.0.bias': 'H',
    'ffn.layers.1.weight': 'C H',
    'ffn.layers.1.bias': 'C',
}
_ATTENTION_SHAPES = {
    1: {'attn.w_msa.relative_position_bias_table': 'T N'},
    2: {
        'attn.w_msa.logit_scale': 'N 1 1',
        'attn.w_msa.cpb_mlp.0.weight': 'M 2',
        'attn.w_msa.cpb_mlp.0.bias': 'M',
        'attn.w_msa.cpb_mlp.2.weight': 'N M',
    },
}
_OPTIONAL_SHAPES = {
    'attn.w_msa.qkv.bias': '3C',
    'attn.w_msa.q_bias': 'C',
    'attn.w_msa.v_bias': 'C',
    **{f'attn.w_msa.{part}.weight': 'C C' for part in 'qkv'},
    **{f'attn.w_msa.{part}.bias': 'C' for part in 'qkv'},
    'norm3.weight': 'C',
    'norm3.bias': 'C',
}
# In Swin V2 merging belongs to the stage after it.
_MERGING_SHAPES = {
    1: {
        'downsample.norm.weight': '4C',
        'downsample.norm.bias': '4C',
        'downsample.reduction.weight': '2C 4C',
    },
    2: {
        'downsample.norm.weight': 'C',
        'downsample.norm.bias': 'C',
        'downsample.reduction.weight': 'C 2C',
    },
}
_EMBEDDING_SHAPES = {
    'patch_embed.projection.weight': 'C * * *',
    'patch_embed.projection.bias': 'C',
    'patch_embed.norm.weight': 'C',
    'patch_embed.norm.bias': 'C',
}
_OTHER_SHAPES = {
    'mask_token': '1 1 C',
    'absolute_pos_embed': '1 * C',
    'head.fc.weight': 'K 8C',
    'head.fc.bias': 'K',
}


def check_whole(names: Iterable[str], num_keys: int, source: Format, layout: Layout) -> None:
    """Raise ``ValueError`` unless the names are those of a whole Swin.

    Args:
        names: Canonical names in the file.
        num_keys: How many keys the file has.
        source: Format of the file.
        layout: Its layout.
    """
    names = set(names)
    if lacking := [name for name in _required(names, layout) if name not in names]:
        raise ValueError(
            f'this is no whole Swin: {len(names)} of {num_keys} keys fit the format '
            f'{source.name}, but {len(lacking)} are lacking, e.g. '
            f'{layout.from_canonical(lacking[0])}'
        )


def _required(names: set[str], layout: Layout) -> list[str]:
    """What a Swin with these names must have, under the layout's names for its parts."""
    ends = dict.fromkeys((*_BLOCK_SHAPES, *_ATTENTION_SHAPES[layout.version]))
    numbers: list[set[int]] = [set() for _ in range(4)]
    for name in names:
        if match := _BLOCK.fullmatch(name):
            numbers[int(match[1])].add(int(match[2]))
            # Biases of the attention are a choice, but one for all blocks.
            if match[3].startswith('attn.') and match[3] in _OPTIONAL_SHAPES:
                if match[3].endswith('bias'):
                    ends[match[3]] = None
    parts = list(ends)
    for transform in layout.transforms:
        for canonical in transform.canonical:
            if (end := canonical[1:]) in parts:
                position = parts.index(end)
                parts[position : position + 1] = [name[1:] for name in transform.foreign]
    blocks = [
        f'stages.{stage}.blocks.{block}.{end}'
        for stage in range(4)
        # Not up to the largest number: a damaged file may have any.
        for block in range(max(len(numbers[stage]), 1))
        for end in dict.fromkeys(parts)
    ]
    first = layout.version - 1
    merging = [
        f'stages.{stage}.{end}'
        for stage in range(first, first + 3)
        for end in _MERGING_SHAPES[layout.version]
    ]
    return [*_EMBEDDING_SHAPES, *blocks, *merging]


def check_shapes(entries: Mapping[str, Entry], version: int) -> None:
    """Raise ``ValueError`` if a value has a shape that does not fit the others.

    Sizes are found by majority, so that the error names the value that is wrong.

    Args:
        entries: Values by canonical name, or by the names of a layout's parts.
        version: Version of Swin.
    """
    shapes = {name: spec for name in entries if (spec := _shape(name, version)) is not None}
    votes: dict[tuple[int, str], Counter] = defaultdict(Counter)
    for name, (stage, dims) in shapes.items():
        value = entries[name].value
        if value.ndim != len(dims):
            continue
        for dim, size in zip(dims, value.shape, strict=True):
            letter, factor = dim[-1], int(dim[:-1] or 1)
            if letter == 'C' and size % (factor << stage) == 0:
                votes[0, 'C'][size // (factor << stage)] += 1
            elif letter in 'HNMK' or (letter == 'T' and _is_odd_square(size)):
                votes[stage, letter][size] += 1
    sizes = {symbol: counter.most_common(1)[0][0] for symbol, counter in votes.items()}
    for name, (stage, dims) in shapes.items():
        expected = [_size(dim, stage, sizes) for dim in dims]
        shape = tuple(entries[name].value.shape)
        if len(shape) != len(expected) or any(
            right is not None and right != size for right, size in zip(expected, shape, strict=True)
        ):
            wanted = ', '.join('any' if size is None else str(size) for size in expected)
            raise ValueError(
                f'{entries[name].sources[0]} has shape {shape}, which does not fit the rest of '
                f'this Swin; it should be ({wanted})'
            )


def _shape(name: str, version: int) -> tuple[int, list[str]] | None:
    """Stage and symbolic shape of a parameter; None if nothing is known about it."""
    match = _BLOCK.fullmatch(name)
    end = match[3] if match else re.sub(r'^stages\.\d\.', '', name)
    tables = (
        (_BLOCK_SHAPES, _ATTENTION_SHAPES[version], _OPTIONAL_SHAPES)
        if match
        else (_MERGING_SHAPES[version], _EMBEDDING_SHAPES, _OTHER_SHAPES)
    )
    shape = next((table[end] for table in tables if end in table), None)
    if re.fullmatch(r'norm[0-3]\.(weight|bias)', name):
        shape = 'C'
    if shape is None:
        return None
    stage = _STAGE.match(name)
    return int(stage[1]) if stage else 0, shape.split()


def _size(dim: str, stage: int, sizes: Mapping[tuple[int, str], int]) -> int | None:
    if dim == '*':
        return None
    if dim.isdigit():
        return int(dim)
    letter, factor = dim[-1], int(dim[:-1] or 1)
    if letter == 'C':
        return factor * (sizes[0, 'C'] << stage)
    # Where there was no vote no value had the right number of axes, or a possible size.
    return sizes.get((stage, letter), -1)


def _is_odd_square(size: int) -> bool:
    side = round(size**0.5)
    return side % 2 == 1 and side**2 == size
