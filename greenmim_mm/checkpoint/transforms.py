"""In what the values of formats differ, besides their names.

- **Channel order of patch merging.** A cell of 2x2 tokens with ``C`` channels is one vector of
  ``4 * C``. OpenMMLab takes it from ``nn.Unfold``: channel first, inside it the place, row by
  row. All others take the place first, column by column. In Swin V1 it concerns the norm before
  the reduction, too; in V2 the norm comes after it.
- **Query, key and value** are one layer, or three (transformers).
- **Biases of queries and values** are two vectors in Swin V2, whose keys have none; torchvision
  has one joint bias, of which it does not use the keys' part.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import relative_position_index


@dataclass(frozen=True)
class Entry:
    """A value on its way from one format to another.

    Attributes:
        value: The value.
        sources: Keys of the source that it is made of.
        how: What was done to it.
    """

    value: Tensor
    sources: tuple[str, ...]
    how: tuple[str, ...] = ()

    def changed(self, value: Tensor, how: str) -> 'Entry':
        """The entry with another value."""
        return replace(self, value=value, how=(*self.how, how))


@dataclass(frozen=True)
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
        return _apply(entries, self.foreign, self.canonical, self.read, self.read_how)

    def writing(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """The way back."""
        return _apply(entries, self.canonical, self.foreign, self.write, self.write_how)


def _apply(
    entries: Mapping[str, Entry],
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    function: Callable[..., tuple[Tensor, ...]],
    how: str,
) -> dict[str, Entry]:
    result: dict[str, Entry] = {}
    for name, entry in entries.items():
        end = next((end for end in inputs if name.endswith(end)), None)
        stem = name.removesuffix(end or '')
        group = [entries.get(stem + end) for end in inputs]
        if end is None or None in group:
            result[name] = entry
        elif end == inputs[0]:
            sources = tuple(source for part in group for source in part.sources)
            steps = tuple(dict.fromkeys(step for part in group for step in part.how)) + (how,)
            values = function(*(part.value for part in group))
            for output, value in zip(outputs, values, strict=True):
                result[stem + output] = Entry(value, sources, steps)
    return result


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


def resize_bias_table(table: Tensor, length: int) -> Tensor:
    """Resize a relative position bias table to another window, bicubically as mmdet does.

    Args:
        table: ``((2 * w - 1) ** 2, heads)``.
        length: Rows of the result, an odd square.

    Returns:
        ``(length, heads)`` in the dtype of ``table``.

    Raises:
        ValueError: If either length is not the square of an odd number.
    """
    old, new = _table_side(table), _table_side(table.new_empty(length, 0))
    image = table.float().t().reshape(1, -1, old, old)
    image = F.interpolate(image, size=(new, new), mode='bicubic', align_corners=False)
    return image.reshape(-1, length).t().contiguous().to(table.dtype)


def table_window(table: Tensor) -> int:
    """Side of the window that a bias table covers.

    Raises:
        ValueError: If the table has the wrong number of rows.
    """
    return (_table_side(table) + 1) // 2


def _table_side(table: Tensor) -> int:
    """Offsets ``2 * w - 1`` along one side of the window that a bias table covers."""
    side = round(table.shape[0] ** 0.5) if table.ndim == 2 else 0
    if side % 2 == 0 or side**2 != table.shape[0]:
        raise ValueError(
            'a relative position bias table has shape ((2 * window_size - 1) ** 2, heads), '
            f'not {tuple(table.shape)}'
        )
    return side


def index_buffer(window_size: int, flat: bool) -> Tensor:
    """``relative_position_index``, ``(w * w, w * w)`` or flat ``(w ** 4,)``, int64."""
    index = relative_position_index(window_size).to(torch.int64)
    return index.flatten() if flat else index


def coords_windows(coords: Tensor) -> tuple[int, int]:
    """Window and pre-training window that a ``relative_coords_table`` was made for.

    Raises:
        ValueError: If it is none.
    """
    side = coords.shape[1] if coords.ndim == 4 else 0
    if side % 2 == 0 or coords.shape != (1, side, side, 2):
        raise ValueError(
            'a relative_coords_table has shape (1, 2 * window_size - 1, 2 * window_size - 1, 2), '
            f'not {tuple(coords.shape)}'
        )
    window_size = (side + 1) // 2
    farthest = (2 ** (coords.float().max().item() * 3) - 1) / 8
    pretrained = round((window_size - 1) / farthest) + 1 if farthest > 0 else window_size
    return window_size, pretrained
