"""Where each visible token lies, and how pixels come into that order.

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

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .masking import UNIT_SIZE, UnitMask

# Bytes between the beginnings of arrays that are copied together: kernels want 16 at least.
_ALIGNMENT = 64


@dataclass(frozen=True)
class StageTokens:
    """Visible tokens of one stage, in memory order.

    Attributes:
        coords: ``(N, 2)`` int64, row and column on the stage's token grid.
        grid: Rows and columns of that grid, hidden tokens included.
    """

    coords: np.ndarray
    grid: tuple[int, int]


@lru_cache
def _nested_order(levels: int) -> np.ndarray:
    """``(4 ** levels, 2)`` row and column inside a square of ``2 ** levels``, nested 2x2 order."""
    order = np.zeros((1, 2), dtype=np.int64)
    corners = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    for _ in range(levels):
        order = (2 * order[:, None] + corners).reshape(-1, 2)
    return order


def visible_tokens(
    mask: UnitMask, patch_size: int = 4, num_stages: int = 4
) -> tuple[StageTokens, ...]:
    """Visible tokens of every stage.

    Args:
        mask: Which units are hidden.
        patch_size: Stride of the first stage in pixels; each stage doubles it.
        num_stages: Number of stages; the last has at least one token in a unit.

    Returns:
        One :class:`StageTokens` a stage; units in row-major order, tokens nested inside.
    """
    rows, columns = mask.grid
    units = np.stack(np.divmod(mask.visible_units, columns), axis=-1)  # (V, 2)
    stages = []
    for stage in range(num_stages):
        side = UNIT_SIZE // (patch_size << stage)
        coords = units[:, None] * side + _nested_order(side.bit_length() - 1)
        stages.append(StageTokens(coords.reshape(-1, 2), (rows * side, columns * side)))
    return tuple(stages)


def take_units(images: Tensor, units: np.ndarray) -> Tensor:
    """Cut mask units out of images; pixels of other units are never copied.

    Args:
        images: ``(B, C, H, W)``, sides divisible by 32.
        units: ``(K,)`` int64, row-major numbers of the units.

    Returns:
        ``(B, K, C, 32, 32)``, in memory channels last: so losses want their target.
    """
    row, column = np.divmod(units, images.shape[3] // UNIT_SIZE)
    inside = np.arange(UNIT_SIZE)
    row, column = (UNIT_SIZE * place[:, None] + inside for place in (row, column))
    channel = np.arange(images.shape[1])
    pixels = _take(images, channel, row[:, :, None, None], column[:, None, :, None])
    return pixels.permute(0, 1, 4, 2, 3)


def visible_patches(images: Tensor, mask: UnitMask, patch_size: int = 4) -> Tensor:
    """Pixels of the visible patches, in token order.

    Args:
        images: ``(B, C, H, W)``, sides divisible by 32.
        mask: Which units are hidden.
        patch_size: Side of a patch in pixels, a power of two up to 32.

    Returns:
        ``(B, N, C * patch_size ** 2)``; a patch is laid out as a convolution kernel is.
    """
    (tokens,) = visible_tokens(mask, patch_size, num_stages=1)
    pixels = patch_size * tokens.coords[:, :, None] + np.arange(patch_size)  # (N, 2, side)
    row, column = pixels[:, 0, None, :, None], pixels[:, 1, None, None, :]
    channel = np.arange(images.shape[1])[:, None, None]
    return _take(images, channel, row, column).flatten(2)


def _take(images: Tensor, *places: np.ndarray) -> Tensor:
    """``images[:, channel, row, column]``: places of one shape, in their order, in one pass."""
    return images[(slice(None), *to_device(places, images.device))]


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


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Arrays as tensors on a device: to CUDA by one copy from pinned memory, without waiting.

    Args:
        arrays: Of any shapes and of any dtypes that torch has.
        device: Where the tensors shall lie; on a CPU they share the memory of the arrays.

    Returns:
        One tensor an array, of its shape and dtype.
    """
    if device.type != 'cuda':
        return [torch.from_numpy(array).to(device) for array in arrays]
    return _in_one_copy(arrays, device, pinned=True)


def _in_one_copy(arrays: Sequence[np.ndarray], device: torch.device, pinned: bool) -> list[Tensor]:
    """Arrays on a device, one behind the other in one piece of its memory."""
    arrays = [np.ascontiguousarray(array) for array in arrays]
    ends = np.cumsum([-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays]).tolist()
    host, begins = np.empty(ends[-1], dtype=np.uint8), [0, *ends[:-1]]
    for array, begin in zip(arrays, begins, strict=True):
        host[begin : begin + array.nbytes] = array.reshape(-1).view(np.uint8)
    piece = torch.from_numpy(host)
    piece = (piece.pin_memory() if pinned else piece).to(device, non_blocking=True)
    return [
        piece[begin : begin + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for array, begin in zip(arrays, begins, strict=True)
    ]
