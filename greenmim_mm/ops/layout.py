"""Where each token lies, and which window it belongs to.

Visible tokens are kept mask unit by mask unit. Inside a unit they are in nested 2x2 order: four
neighbours in memory are one cell of patch merging, at every stage. A unit of 4x4 tokens::

     0  1 |  4  5
     2  3 |  6  7        merging makes      0 | 1
    ------+------                          ---+---
     8  9 | 12 13                           2 | 3
    10 11 | 14 15

so merging is ``x.reshape(B, N // 4, 4 * C)``. The unit's 64 tokens of stage 1 become 16, 4 and 1.

Coordinates are ``(row, column)`` on the token grid of a stage.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .grouping import group_windows
from .masking import UNIT_SIZE


@dataclass(frozen=True)
class StageTokens:
    """Visible tokens of one stage, in memory order.

    Attributes:
        coords: ``(N, 2)`` int64, row and column on the stage's token grid.
        grid: Rows and columns of that grid, hidden tokens included.
    """

    coords: np.ndarray
    grid: tuple[int, int]


@dataclass(frozen=True)
class WindowGrid:
    """How a token grid is cut into windows.

    Window borders run at ``shift + k * window`` and at the edges of the padded grid, without
    wrap-around: this is what Swin's cyclic shift with its attention mask computes.

    Attributes:
        grid: Rows and columns of the token grid.
        window: Height and width of a window.
        shift: Tokens by which the borders are shifted, rows and columns.
    """

    grid: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int]

    @property
    def padded(self) -> tuple[int, int]:
        """The grid, padded at the bottom and the right to whole windows."""
        (rows, columns), (height, width) = self.grid, self.window
        return -(-rows // height) * height, -(-columns // width) * width

    def window_ids(self, coords: np.ndarray) -> np.ndarray:
        """Window of each coordinate: ``(..., 2) -> (...)`` int64, unique to the window."""
        row = (coords[..., 0] - self.shift[0]) // self.window[0] + 1
        column = (coords[..., 1] - self.shift[1]) // self.window[1] + 1
        return row * (self.padded[1] // self.window[1] + 1) + column


def window_grid(
    grid: tuple[int, int], window_size: int, shifted: bool, pad_small_map: bool = False
) -> WindowGrid:
    """Window cut of a stage.

    Args:
        grid: Rows and columns of the token grid.
        window_size: Side of a window.
        shifted: Whether the block shifts its windows, by ``window_size // 2``.
        pad_small_map: What happens where a side of the grid is no larger than the window. False:
            the window shrinks to the grid and nothing shifts (Swin's own rule, and
            mmpretrain's). True: the grid is padded to the window and shifted (mmdet's rule).
    """
    if not pad_small_map and min(grid) <= window_size:
        window = min(window_size, grid[0]), min(window_size, grid[1])
        return WindowGrid(grid, window, (0, 0))
    shift = window_size // 2 if shifted else 0
    return WindowGrid(grid, (window_size, window_size), (shift, shift))


@dataclass(frozen=True)
class GroupPlan:
    """Where the tokens of a stage sit for attention: ``G`` groups of ``g`` slots.

    A slot holds a token, a padding token of Swin (``token == num_tokens``: its query, key and
    value are the bias of the projection), or nothing (then its ``window`` is -1). A token may
    attend to the slots of its group that have its window.

    Attributes:
        token: ``(G, g)`` int64, token of each slot.
        window: ``(G, g)`` int64, window of each slot.
        coords: ``(G, g, 2)`` int64, row and column of each slot; ``(1, g, 2)`` where they are
            alike in all groups up to a translation.
        slot: ``(N,)`` int64, slot of each token in the flattened groups.
    """

    token: np.ndarray
    window: np.ndarray
    coords: np.ndarray
    slot: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Number ``N`` of real tokens."""
        return len(self.slot)


@lru_cache
def _nested_order(levels: int) -> np.ndarray:
    """``(4 ** levels, 2)`` row and column inside a square of ``2 ** levels``, nested 2x2 order."""
    index = np.arange(4**levels)
    row = sum((index >> (2 * bit + 1) & 1) << bit for bit in range(levels))
    column = sum((index >> (2 * bit) & 1) << bit for bit in range(levels))
    return np.stack([row + 0 * index, column + 0 * index], axis=-1)


def visible_tokens(
    mask: np.ndarray, grid: tuple[int, int], patch_size: int = 4, num_stages: int = 4
) -> tuple[StageTokens, ...]:
    """Visible tokens of every stage.

    Args:
        mask: ``(L,)`` bool, True = masked, row-major over the units.
        grid: Mask units ``(rows, columns)`` of the image, ``L = rows * columns``.
        patch_size: Stride of the first stage in pixels; each stage doubles it.
        num_stages: Number of stages; the last has at least one token in a unit.

    Returns:
        One :class:`StageTokens` a stage; units in row-major order, tokens nested inside.
    """
    units = np.stack(np.divmod(np.flatnonzero(~mask), grid[1]), axis=-1)  # (V, 2)
    stages = []
    for stage in range(num_stages):
        side = UNIT_SIZE // (patch_size << stage)
        coords = units[:, None] * side + _nested_order(side.bit_length() - 1)
        stages.append(StageTokens(coords.reshape(-1, 2), (grid[0] * side, grid[1] * side)))
    return tuple(stages)


def visible_patches(images: Tensor, mask: np.ndarray, patch_size: int = 4) -> Tensor:
    """Pixels of the visible patches, in token order; hidden pixels are never copied.

    Args:
        images: ``(B, C, H, W)``, sides divisible by 32.
        mask: ``(L,)`` bool, True = masked, row-major over the units.
        patch_size: Side of a patch in pixels, a power of two up to 32.

    Returns:
        ``(B, N, C * patch_size ** 2)``; a patch is laid out as a convolution kernel is.
    """
    batch, channels, height, width = images.shape
    side = UNIT_SIZE // patch_size
    levels = side.bit_length() - 1
    rows, columns = np.divmod(np.flatnonzero(~mask), width // UNIT_SIZE)
    units = images.reshape(
        batch, channels, height // UNIT_SIZE, UNIT_SIZE, width // UNIT_SIZE, UNIT_SIZE
    )
    # Two index arrays with a slice between them put the units first: (V, B, C, 32, 32).
    units = units[:, :, to_device(rows, images.device), :, to_device(columns, images.device)]
    split = [2] * levels + [patch_size]
    units = units.reshape(-1, batch, channels, *split, *split)
    # (V, B, C, y..., py, x..., px) -> (B, V, y0, x0, y1, x1, ..., C, py, px)
    y, x = 3, 3 + levels + 1
    nested = [axis for level in range(levels) for axis in (y + level, x + level)]
    units = units.permute(1, 0, *nested, 2, y + levels, x + levels)
    return units.reshape(batch, -1, channels * patch_size**2)


def merge_cells(x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Gather the 2x2 cells of patch merging from a dense map.

    Args:
        x: ``(B, rows * columns, C)``, row-major. Odd sides are padded with zeros.
        grid: Rows and columns of the map.

    Returns:
        ``(B, cells, 4 * C)`` with the cell's tokens row by row, and the grid of cells.
    """
    batch, _, channels = x.shape
    rows, columns = grid
    x = x.view(batch, rows, columns, channels)
    if rows % 2 or columns % 2:
        x = F.pad(x, (0, 0, 0, columns % 2, 0, rows % 2))
    rows, columns = (rows + 1) // 2, (columns + 1) // 2
    x = x.reshape(batch, rows, 2, columns, 2, channels).transpose(2, 3)
    return x.reshape(batch, rows * columns, 4 * channels), (rows, columns)


def grouped_plan(tokens: StageTokens, windows: WindowGrid) -> GroupPlan:
    """Pack the windows of the visible tokens into groups at least cost.

    Swin pads a grid to whole windows, and its padding tokens are attended to. They are kept
    here too, in the windows that have a visible token: the masked network is the dense one.

    Args:
        tokens: Visible tokens of the stage.
        windows: Window cut of the same grid.
    """
    num_tokens = len(tokens.coords)
    coords = np.concatenate([tokens.coords, _padding_coords(windows)])
    window = windows.window_ids(coords)
    seen = np.zeros(window.max() + 1, dtype=bool)
    seen[window[:num_tokens]] = True
    kept = seen[window]
    token = np.minimum(np.arange(len(coords)), num_tokens)[kept]
    coords, window = coords[kept], window[kept]

    # Members of each window stand next to each other after one stable sort.
    order = np.argsort(window, kind='stable')
    _, starts, sizes = np.unique(window[order], return_index=True, return_counts=True)
    grouping = group_windows(sizes)

    num_groups, group_size = len(grouping.groups), grouping.group_size
    member = np.concatenate([np.array(group) for group in grouping.groups])
    group_of = np.repeat(np.arange(num_groups), [len(group) for group in grouping.groups])
    # Slots: each group's windows follow each other from the group's first slot on.
    length = sizes[member]
    end = np.cumsum(length)
    first_in_group = np.r_[True, group_of[1:] != group_of[:-1]]
    group_start = (end - length)[first_in_group][group_of]
    within = np.arange(end[-1]) - np.repeat(end - length, length)
    source = order[np.repeat(starts[member], length) + within]
    slot = np.repeat(group_of * group_size + end - length - group_start, length) + within

    plan_token = np.zeros(num_groups * group_size, dtype=np.int64)
    plan_window = np.full(num_groups * group_size, -1, dtype=np.int64)
    plan_coords = np.zeros((num_groups * group_size, 2), dtype=np.int64)
    plan_token[slot] = token[source]
    plan_window[slot] = window[source]
    plan_coords[slot] = coords[source]
    real = token[source] < num_tokens
    token_slot = np.empty(num_tokens, dtype=np.int64)
    token_slot[token[source][real]] = slot[real]
    shape = (num_groups, group_size)
    return GroupPlan(
        plan_token.reshape(shape),
        plan_window.reshape(shape),
        plan_coords.reshape(*shape, 2),
        token_slot,
    )


def dense_plan(windows: WindowGrid) -> GroupPlan:
    """Every token visible, tokens in row-major order: one group a window of the cyclic shift."""
    rows, columns = windows.padded
    height, width = windows.window
    cells = np.stack(np.mgrid[:rows, :columns], axis=-1)
    cells = np.roll(cells, (-windows.shift[0], -windows.shift[1]), axis=(0, 1))
    coords = cells.reshape(rows // height, height, columns // width, width, 2)
    coords = coords.transpose(0, 2, 1, 3, 4).reshape(-1, height * width, 2)
    row, column = coords[..., 0], coords[..., 1]
    local = np.stack(np.mgrid[:height, :width], axis=-1).reshape(1, -1, 2)
    num_tokens = windows.grid[0] * windows.grid[1]
    real = (row < windows.grid[0]) & (column < windows.grid[1])
    token = np.where(real, row * windows.grid[1] + column, num_tokens)
    slot = np.empty(num_tokens, dtype=np.int64)
    slot[token[real]] = np.flatnonzero(real)
    return GroupPlan(token, windows.window_ids(coords), local, slot)


def _padding_coords(windows: WindowGrid) -> np.ndarray:
    """``(P, 2)`` coordinates that the padding to whole windows adds."""
    if windows.padded == windows.grid:
        return np.empty((0, 2), dtype=np.int64)
    cells = np.stack(np.mgrid[: windows.padded[0], : windows.padded[1]], axis=-1).reshape(-1, 2)
    return cells[(cells[:, 0] >= windows.grid[0]) | (cells[:, 1] >= windows.grid[1])]


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an index array to ``device``; to CUDA from pinned memory, without waiting."""
    tensor = torch.from_numpy(array)
    if device.type == 'cuda':
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
