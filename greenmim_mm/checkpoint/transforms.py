"""In what the values of formats differ, besides their names.

- **Channel order of patch merging.** A cell of 2x2 tokens with ``C`` channels is one vector of
  ``4 * C``. OpenMMLab takes it from ``nn.Unfold``: channel first, inside it the place, row by
  row. All others take the place first, column by column. In Swin V1 it concerns the norm before
  the reduction, too; in V2 the norm comes after it.
- **Query, key and value** are one layer, or three (transformers).
- **Index buffers** are square, or flat (torchvision).
- **Biases of queries and values** are two vectors in Swin V2, whose keys have none; torchvision
  has one joint bias, of which it does not use the keys' part.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

TABLE = 'relative_position_bias_table'
INDEX = 'relative_position_index'
COORDS = 'relative_coords_table'
# What follows from the windows, under these names in every format.
BUFFERS = (INDEX, COORDS, 'attn_mask')


@dataclass(frozen=True)
class Entry:
    """A value on its way from one format to another.

    Attributes:
        value: The value.
        sources: Keys of the source that it is made of, each with the value there.
        how: What was done to it.
        read_by: The transform that made the value of ``sources``; None if none did, or if the
            value was changed since.
    """

    value: Tensor
    sources: Mapping[str, Tensor]
    how: tuple[str, ...] = ()
    read_by: 'Transform | None' = None

    def changed(self, value: Tensor, how: str) -> 'Entry':
        """The entry with another value."""
        return replace(self, value=value, how=(*self.how, how), read_by=None)


@dataclass(frozen=True, eq=False)
class Transform:
    """How some parameters of a format are made of canonical ones, and back.

    Attributes:
        foreign: Ends of the names in the format.
        canonical: Ends of the canonical names.
        read: Values under ``foreign`` to values under ``canonical``.
        write: The way back.
        read_how: What reading does, for reports.
        write_how: What writing does.
    """

    foreign: tuple[str, ...]
    canonical: tuple[str, ...]
    read: Callable[..., tuple[Tensor, ...]]
    write: Callable[..., tuple[Tensor, ...]]
    read_how: str
    write_how: str

    def reading(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """Entries under the format's names to entries under canonical ones."""

        def read(*parts: Entry) -> Iterator[Entry]:
            sources = {key: value for part in parts for key, value in part.sources.items()}
            for value in self.read(*(part.value for part in parts)):
                yield Entry(value, sources, (self.read_how,), self)

        return _regrouped(entries, self.foreign, self.canonical, read)

    def writing(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """The way back; what this transform has read becomes what it was."""

        def write(*parts: Entry) -> Iterator[Entry]:
            if all(part.read_by is self for part in parts):
                for key, value in parts[0].sources.items():
                    yield Entry(value, {key: value})
                return
            sources = {key: value for part in parts for key, value in part.sources.items()}
            steps = dict.fromkeys(step for part in parts for step in part.how)
            for value in self.write(*(part.value for part in parts)):
                yield Entry(value, sources, (*steps, self.write_how))

        return _regrouped(entries, self.canonical, self.foreign, write)


def _regrouped(
    entries: Mapping[str, Entry],
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    function: Callable[..., Iterator[Entry]],
) -> dict[str, Entry]:
    """Entries in which each whole group with the ends ``inputs`` has become one of ``outputs``."""
    result: dict[str, Entry] = {}
    for name, entry in entries.items():
        end = next((end for end in inputs if name.endswith(end)), None)
        stem = name.removesuffix(end or '')
        group = [entries.get(stem + end) for end in inputs]
        if end is None or None in group:
            result[name] = entry
        elif end == inputs[0]:
            for output, made in zip(outputs, function(*group), strict=True):
                result[stem + output] = made
    return result


def written_shapes(
    shapes: Mapping[str, tuple[int, ...]], transforms: Iterable[Transform]
) -> dict[str, tuple[int, ...]]:
    """The shapes that parameters of these canonical shapes have after the transforms."""
    entries = {name: Entry(torch.empty(shape, device='meta'), {}) for name, shape in shapes.items()}
    for transform in transforms:
        entries = transform.writing(entries)
    return {name: tuple(entry.value.shape) for name, entry in entries.items()}


def to_unfold_order(value: Tensor) -> Tensor:
    """Channels of patch merging, ``(..., 4 * C)``: (column, row, C) to (C, row, column)."""
    return value.unflatten(-1, (2, 2, -1)).transpose(-3, -1).flatten(-3).contiguous()


def to_column_order(value: Tensor) -> Tensor:
    """Channels of patch merging, ``(..., 4 * C)``: (C, row, column) to (column, row, C)."""
    return value.unflatten(-1, (-1, 2, 2)).transpose(-3, -1).flatten(-3).contiguous()


def _columns(end: str) -> Transform:
    return Transform(
        (end,),
        (end,),
        lambda value: (to_unfold_order(value),),
        lambda value: (to_column_order(value),),
        'channel order of patch merging',
        'channel order of patch merging',
    )


COLUMNS_V2 = (_columns('.downsample.reduction.weight'),)
COLUMNS_V1 = (
    *COLUMNS_V2,
    _columns('.downsample.norm.weight'),
    _columns('.downsample.norm.bias'),
)


def _split(end: str) -> Transform:
    return Transform(
        tuple(f'.attn.w_msa.{part}.{end}' for part in 'qkv'),
        (f'.attn.w_msa.qkv.{end}',),
        lambda *parts: (torch.cat(parts),),
        # Values of their own: safetensors refuses tensors that share memory.
        lambda joint: tuple(part.clone() for part in joint.chunk(3)),
        'query, key and value joined',
        'query, key and value split',
    )


SPLIT_V2 = (_split('weight'),)
SPLIT_V1 = (*SPLIT_V2, _split('bias'))


def _without_key(joint: Tensor) -> tuple[Tensor, Tensor]:
    query, _, value = joint.chunk(3)
    return query.clone(), value.clone()


KEY_BIAS = (
    Transform(
        ('.attn.w_msa.qkv.bias',),
        ('.attn.w_msa.q_bias', '.attn.w_msa.v_bias'),
        _without_key,
        lambda query, value: (torch.cat((query, torch.zeros_like(query), value)),),
        'bias split; its part for the keys is not used',
        'bias joined, zeros for the keys',
    ),
)


def _square(index: Tensor) -> Tensor:
    side = round(index.numel() ** 0.5)
    # What is no index is left as it is; it will be made anew.
    return index.reshape(side, side) if side**2 == index.numel() else index


FLAT_INDEX = (
    Transform(
        ('.attn.w_msa.' + INDEX,),
        ('.attn.w_msa.' + INDEX,),
        lambda flat: (_square(flat),),
        lambda square: (square.flatten(),),
        'index made square',
        'index made flat',
    ),
)
