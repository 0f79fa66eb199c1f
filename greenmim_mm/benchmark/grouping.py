"""How the time to plan a step grows with the image."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from ..models import GreenSwin
from ..ops import (
    GroupPlan,
    UnitMask,
    group_windows,
    grouped_plan,
    plan_pair,
    random_mask,
    unit_grid,
    visible_tokens,
)
from .report import cell, markdown


@dataclass
class GroupingResult:
    """Planning of one step for images of one size: four stages, plain and shifted windows.

    Attributes:
        name: Side of the image.
        tokens: Visible tokens of the first stage.
        seconds: Seconds of planning, an entry for each mask.
        packing_seconds: Seconds of choosing sizes and groups, without the indices made of them.
        table_seconds: Seconds that a table-filling knapsack takes for groups of the same sizes,
            which it is told.
        groups: Groups of all masks.
        table_groups: Groups of all masks, by the table-filling knapsack.
        filled: Slots of all masks that hold a token.
        slots: Slots of all masks.
        failure: Why it was not measured to the end.
        note: What else is to be said.
    """

    name: str
    tokens: int
    seconds: list[float] = field(default_factory=list)
    packing_seconds: list[float] = field(default_factory=list)
    table_seconds: list[float] = field(default_factory=list)
    groups: int = 0
    table_groups: int = 0
    filled: int = 0
    slots: int = 0
    failure: str = ''
    note: str = ''


def table_filling_packs(sizes: Sequence[int], group_size: int) -> list[list[int]]:
    """Pack windows by a 0/1 knapsack that fills a table in Python: the baseline.

    Args:
        sizes: Tokens of each window, all in ``[1, group_size]``.
        group_size: Slots of a group.

    Returns:
        For every group the indices into ``sizes``.
    """
    left = list(range(len(sizes)))
    groups = []
    while left:
        # fullest[i][room]: most slots that the first i windows can fill of so much room
        fullest = [[0] * (group_size + 1)]
        for index in left:
            size, before = sizes[index], fullest[-1]
            row = before[:size]
            for room in range(size, group_size + 1):
                row.append(max(before[room], before[room - size] + size))
            fullest.append(row)
        group, room = [], group_size
        for number in range(len(left), 0, -1):
            if fullest[number][room] != fullest[number - 1][room]:
                group.append(left.pop(number - 1))
                room -= sizes[group[-1]]
        groups.append(group)
    return groups


def run(
    results: list[GroupingResult],
    log: Callable[[str], None],
    pixels: Sequence[int] = (224, 448, 672, 1024),
    window: int = 7,
    mask_ratio: float = 0.75,
    repeats: int = 5,
    table_limit: int = 1024,
) -> None:
    """Time the planning of steps.

    Args:
        results: Gets one entry for each size.
        log: Takes a line about the progress.
        pixels: Sides of the images, multiples of 32.
        window: Side of the windows in tokens.
        mask_ratio: Share of units to hide.
        repeats: Masks of each size.
        table_limit: Side of the largest image that the table-filling knapsack is run for.
    """
    # The network itself does not run: a narrow one plans as a wide one does.
    arch = dict(embed_dims=8, depths=(2, 2, 2, 2), num_heads=(1, 1, 1, 1))
    backbone = GreenSwin(arch, window_size=window)
    rng = np.random.default_rng(0)
    cpu = torch.device('cpu')
    for side in pixels:
        grid = unit_grid(side, side)
        masks = [
            UnitMask(grid, random_mask(grid[0] * grid[1], mask_ratio, rng)) for _ in range(repeats)
        ]
        result = GroupingResult(f'{side} px', 64 * len(masks[0].visible_units))
        results.append(result)
        if side > table_limit:
            result.note = f'table-filling skipped above {table_limit} px'
        for mask in masks:
            start = time.perf_counter()
            backbone.plan(mask, cpu)
            result.seconds.append(time.perf_counter() - start)
            _compare(result, _group_plans(mask, window), side <= table_limit)
            log(f'{result.name}: {len(result.seconds)} of {repeats} masks')


def _group_plans(mask: UnitMask, window: int) -> list[GroupPlan]:
    """Plans of a step: each stage's distinct cuts, as the backbone makes them."""
    plans = []
    for tokens in visible_tokens(mask):
        plain, shifted = plan_pair(partial(grouped_plan, tokens), tokens.grid, window)
        plans += [plain] if shifted is plain else [plain, shifted]
    return plans


def _compare(result: GroupingResult, plans: Sequence[GroupPlan], with_table: bool) -> None:
    """Count the groups, and have the table-filling knapsack pack groups of the same sizes."""
    problems = []
    for plan in plans:
        used = plan.window >= 0
        result.groups += int(used.any(axis=1).sum())
        result.filled += int(used.sum())
        result.slots += used.size
        sizes = np.unique(plan.window[used], return_counts=True)[1]
        problems.append((sizes.tolist(), plan.window.shape[1]))
    start = time.perf_counter()
    for sizes, _ in problems:
        group_windows(sizes)
    result.packing_seconds.append(time.perf_counter() - start)
    if with_table:
        start = time.perf_counter()
        packs = [table_filling_packs(*problem) for problem in problems]
        result.table_seconds.append(time.perf_counter() - start)
        result.table_groups += sum(map(len, packs))


def tables(results: Sequence[GroupingResult]) -> str:
    """Results as a table; the numbers of groups are means over the masks."""
    return markdown([_row(result) for result in results]) if results else ''


def _row(result: GroupingResult) -> dict[str, str]:
    masks = len(result.seconds) or 1
    ours, packing, theirs = (
        1000 * statistics.median(seconds) if seconds else None
        for seconds in (result.seconds, result.packing_seconds, result.table_seconds)
    )
    return {
        'image': result.name,
        'visible tokens': str(result.tokens),
        'planning a step': cell(ours, '{:.1f} ms'),
        'of it choosing groups': cell(packing, '{:.1f} ms'),
        'groups': f'{result.groups / masks:.1f}',
        'slots filled': f'{result.filled / max(result.slots, 1):.1%}',
        'groups by table-filling': cell(theirs, '{:.1f} ms'),
        'their number': cell(result.table_groups / masks if theirs else None, '{:.1f}'),
        'choosing is faster': cell(theirs / packing if theirs and packing else None, '{:.1f}x'),
        'note': '; '.join(filter(None, (result.failure, result.note))),
    }
