"""Which tokens sit together for attention: windows, the groups that hold them, and their plan.

A plan says for every slot of every group which token is there and which window the token is of.
For a masked image the groups are packed on the CPU (:func:`grouped_plan`, numpy); for a dense map
a group is a window of Swin's cyclic shift, and its plan is arithmetic on indices in torch, so
that it can be traced (:func:`dense_plan`). Attention (:mod:`.attention`) knows plans alone.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from .grouping import group_windows
from .layout import StageTokens, to_device


@dataclass(frozen=True)
class WindowGrid:
    """How a token grid is cut into windows.

    Window borders run at ``shift + k * window`` and at the edges of the padded grid, without
    wrap-around: this is what Swin's cyclic shift with its attention mask computes.

    Attributes:
        grid: Rows and columns of the token grid.
        window: Side of a window.
        shift: Tokens by which the borders are shifted, in rows and columns alike.
    """

    grid: tuple[int, int]
    window: int
    shift: int

    @property
    def padded(self) -> tuple[int, int]:
        """The grid, padded at the bottom and the right to whole windows."""
        rows, columns = (-(-side // self.window) * self.window for side in self.grid)
        return rows, columns

    def window_ids(self, coords: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """Window of each coordinate: ``(..., 2) -> (...)`` int64, unique to the window."""
        row, column = ((coords[..., i] - self.shift) // self.window + 1 for i in (0, 1))
        return row * (self.padded[1] // self.window + 1) + column


def window_grid(
    grid: tuple[int, int], window_size: int, shifted: bool, pad_small_map: bool = False
) -> WindowGrid:
    """Window cut of a stage.

    Libraries differ where the smaller side of the grid is no larger than the window. Microsoft's
    Swin takes that side for both sides of the window and shifts nothing: so does this by default.
    mmpretrain refuses a smaller side. timm decides for each side of the window by itself, and
    shifts along a side that is longer than the window. mmdet and detectron2 pad the grid to whole
    windows and shift: so does this with ``pad_small_map``.

    Args:
        grid: Rows and columns of the token grid.
        window_size: Side of a window.
        shifted: Whether the block shifts its windows, by ``window_size // 2``.
        pad_small_map: Whether a small grid is padded rather than the window shrunk.
    """
    if not pad_small_map and min(grid) <= window_size:
        return WindowGrid(grid, min(grid), 0)
    return WindowGrid(grid, window_size, window_size // 2 if shifted else 0)


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


def _padding_coords(windows: WindowGrid) -> np.ndarray:
    """``(P, 2)`` coordinates that the padding to whole windows adds."""
    if windows.padded == windows.grid:
        return np.empty((0, 2), dtype=np.int64)
    cells = np.stack(np.mgrid[: windows.padded[0], : windows.padded[1]], axis=-1).reshape(-1, 2)
    return cells[(cells >= windows.grid).any(axis=1)]


@dataclass(frozen=True)
class AttentionPlan:
    """What attention wants to know, on a device; the same for all blocks of a stage.

    ``P`` is ``G``, or 1 where all groups have the same relative positions.

    Attributes:
        token: ``(G * g,)`` int64, row of each slot in the projected tokens: ``N`` stands for
            Swin's padding token; a slot without a token holds any valid row.
        slot: ``(N,)`` int64, slot of each token.
        padding: Slots that hold the padding token, int64; None if the plan has no such token.
            Where it is a tensor, even an empty one, projected tokens have ``N + 1`` rows.
        idle: Slots without a token of the ``N``, int64: their output is not read. None if the
            plan has none.
        window: ``(G, g)`` int64, window of each slot, -1 where a slot is unused.
        bias_index: ``(P, g, g)`` int64, row of the relative position bias table for each pair
            (query, key) of a window; 0 for other pairs.
        blocked: ``(G, g, g)`` bool, True where query and key are not of one window; None where
            each group is one window.
    """

    token: Tensor
    slot: Tensor
    padding: Tensor | None
    idle: Tensor | None
    window: Tensor
    bias_index: Tensor
    blocked: Tensor | None

    @property
    def num_rows(self) -> int:
        """Rows of projected tokens: ``N``, or ``N + 1`` with the padding token behind them."""
        return self.slot.shape[0] + (0 if self.padding is None else 1)

    # Kept with the plan, which inference may have asked first: a later training step needs no
    # tensors of inference mode.
    @cached_property
    @torch.inference_mode(False)
    def by_position(self) -> 'AttentionPlan':
        """The same plan with slots counted position by position, the groups of each in turn."""
        groups, size = self.window.shape
        place = torch.arange(groups * size, device=self.slot.device).view(size, groups).t()
        place = place.flatten()

        def moved(slot: Tensor | None) -> Tensor | None:
            return None if slot is None else place[slot]

        return replace(
            self,
            token=self.token.view(groups, size).t().flatten(),
            slot=moved(self.slot),
            padding=moved(self.padding),
            idle=moved(self.idle),
        )

    @property
    def num_bytes(self) -> int:
        """Memory of the plan."""
        tensors = (getattr(self, field.name) for field in fields(self))
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def parts(self, groups_at_a_time: int | None) -> list[tuple[slice, Tensor, Tensor | None]]:
        """Runs of groups: which groups, their ``bias_index`` and their ``blocked``."""
        if groups_at_a_time is None:
            return [(slice(None), self.bias_index, self.blocked)]
        starts = range(0, len(self.window), groups_at_a_time)
        runs = [slice(start, start + groups_at_a_time) for start in starts]
        shared = len(self.bias_index) == 1
        return [
            (
                run,
                self.bias_index if shared else self.bias_index[run],
                None if self.blocked is None else self.blocked[run],
            )
            for run in runs
        ]


def attention_plan(groups: GroupPlan, window_size: int, device: torch.device) -> AttentionPlan:
    """Move packed groups to a device and derive what attention needs.

    Args:
        groups: The groups.
        window_size: Side of the window that the bias table was made for. Windows may be smaller,
            not larger.
        device: Where attention will run. The copy to CUDA does not wait for the device.
    """
    token = groups.token.reshape(-1)
    idle = np.ones(len(token), dtype=bool)
    idle[groups.slot] = False
    optional = dict(padding=np.flatnonzero(token == groups.num_tokens), idle=np.flatnonzero(idle))
    arrays = dict(
        token=token,
        slot=groups.slot,
        window=groups.window,
        positions=np.stack(_positions(groups.coords, window_size)),
        **{name: slots for name, slots in optional.items() if len(slots)},
    )
    tensors = dict(zip(arrays, to_device(list(arrays.values()), device), strict=True))
    bias_index = _differences(*tensors.pop('positions'))
    blocked = None
    if (groups.window != groups.window[:, :1]).any():
        window = tensors['window']
        blocked = window[:, :, None] != window[:, None, :]
        bias_index = bias_index.masked_fill(blocked, 0)
    return AttentionPlan(
        **dict.fromkeys(optional) | tensors, bias_index=bias_index, blocked=blocked
    )


def dense_plan(windows: WindowGrid, window_size: int, device: torch.device) -> AttentionPlan:
    """Every token visible, tokens in row-major order: one group a window of the cyclic shift.

    Sizes of the grid may be symbolic, as in :func:`torch.export.export` with dynamic height and
    width: no shape here depends on values.

    Args:
        windows: Window cut of the map.
        window_size: Side of the window that the bias table was made for.
        device: Where attention will run.
    """
    (rows, columns), side, shift = windows.grid, windows.window, windows.shift
    padded_rows, padded_columns = windows.padded
    across = padded_columns // side  # windows side by side

    def cells(top: int, bottom: int, left: int, right: int) -> tuple[Tensor, Tensor]:
        row = torch.arange(top, bottom, device=device)[:, None].expand(-1, right - left)
        column = torch.arange(left, right, device=device).expand(bottom - top, -1)
        return row.reshape(-1), column.reshape(-1)

    def slots(row: Tensor, column: Tensor) -> Tensor:
        row, column = (row - shift) % padded_rows, (column - shift) % padded_columns
        window = row // side * across + column // side
        return window * side**2 + row % side * side + column % side

    slot = torch.arange(padded_rows * padded_columns, device=device)
    window, within = slot // side**2, slot % side**2
    row = (window // across * side + within // side + shift) % padded_rows
    column = (window % across * side + within % side + shift) % padded_columns
    inside = (row < rows) & (column < columns)
    window = windows.window_ids(torch.stack([row, column], dim=-1)).view(-1, side**2)
    padding = None
    if any(isinstance(size, torch.SymInt) for size in windows.grid):
        # Whether there is padding is not known; room for its token does no harm, and where it
        # lies only the backward pass of eager mode asks.
        padding = slot.new_empty(0)
    elif windows.padded != windows.grid:
        right = slots(*cells(0, rows, columns, padded_columns))
        bottom = slots(*cells(rows, padded_rows, 0, padded_columns))
        padding = torch.cat([right, bottom])
    return AttentionPlan(
        token=torch.where(inside, row * columns + column, rows * columns),
        slot=slots(*cells(0, rows, 0, columns)),
        padding=padding,
        idle=padding,
        window=window,
        bias_index=_bias_index(torch.stack(cells(0, side, 0, side), dim=-1)[None], window_size),
        blocked=window[:, :, None] != window[:, None, :] if shift else None,
    )


Plan = TypeVar('Plan', AttentionPlan, GroupPlan)

PlanPair = tuple[AttentionPlan, AttentionPlan]
"""Plans for the plain and for the shifted windows of a stage."""


def plan_pair(
    make: Callable[[WindowGrid], Plan],
    grid: tuple[int, int],
    window_size: int,
    pad_small_map: bool = False,
) -> tuple[Plan, Plan]:
    """Plans for the plain and for the shifted windows of a stage; one where nothing shifts.

    Args:
        make: Makes the plan of a window cut.
        grid: Rows and columns of the stage's token grid.
        window_size: Side of a window.
        pad_small_map: As of :func:`window_grid`.
    """
    plain, shifted = (window_grid(grid, window_size, s, pad_small_map) for s in (False, True))
    plan = make(plain)
    return plan, plan if shifted == plain else make(shifted)


class PlanCache:
    """Pairs of plans, the least recently used dropped first, bounded by their memory.

    Args:
        max_bytes: Memory of all that is kept; what is larger alone is not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._kept: OrderedDict[Hashable, PlanPair] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], PlanPair]) -> PlanPair:
        """The pair under ``key``, made now if it is not kept."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        pair = self._kept[key] = make()
        self.num_bytes += _pair_bytes(pair)
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= _pair_bytes(self._kept.popitem(last=False)[1])
        return pair


def _pair_bytes(pair: PlanPair) -> int:
    plain, shifted = pair
    return plain.num_bytes + (0 if shifted is plain else shifted.num_bytes)


def _positions(
    coords: np.ndarray | Tensor, window_size: int
) -> tuple[np.ndarray | Tensor, np.ndarray | Tensor]:
    """``(P, g, 2)`` coordinates to two numbers ``(P, g)`` of a slot, as a query and as a key.

    Their difference is the row of the bias table for the pair.
    """
    key = coords[..., 0] * (2 * window_size - 1) + coords[..., 1]
    return key + 2 * window_size * (window_size - 1), key


def _differences(query: Tensor, key: Tensor) -> Tensor:
    """``(P, g)`` numbers of slots to ``(P, g, g)`` rows of the bias table for (query, key)."""
    return query[:, :, None] - key[:, None, :]


def _bias_index(coords: Tensor, window_size: int) -> Tensor:
    """``(P, g, 2)`` rows and columns to ``(P, g, g)`` rows of the bias table for (query, key)."""
    return _differences(*_positions(coords, window_size))


def relative_position_index(window_size: int) -> Tensor:
    """``(w * w, w * w)`` int64 rows of the bias table for each pair of a window's tokens.

    The same numbers as the buffer of that name in mmdet's, mmpretrain's and timm's Swin.
    """
    coords = torch.from_numpy(np.stack(np.mgrid[:window_size, :window_size], axis=-1))
    return _bias_index(coords.reshape(1, -1, 2), window_size)[0]
