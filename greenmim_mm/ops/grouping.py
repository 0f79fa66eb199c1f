"""Windows of unequal size -> groups of equal size, at least cost (GreenMIM, optimal grouping).

After masking, windows hold different numbers of visible tokens. Batched attention wants batches
of one length. So windows are packed into groups of ``g`` slots; attention runs inside a group
and a mask keeps each token to its own window. With three windows of 3, 2 and 4 tokens and
``g = 5`` two groups suffice::

    group 0: [w0 w0 w0 w1 w1]      3 + 2 = 5, full
    group 1: [w2 w2 w2 w2  . ]     one slot is left unused

Small groups waste slots, large groups waste attention between windows. :func:`group_windows`
packs for every useful ``g`` and takes the cheapest.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Grouping:
    """A packing of windows into groups.

    Attributes:
        group_size: Slots of a group, ``g``.
        groups: For every group the indices of its windows.
        cost: Cost of the packing in the cost model that chose it.
    """

    group_size: int
    groups: tuple[tuple[int, ...], ...]
    cost: float


def attention_cost(group_size: np.ndarray, linear: float = 32.0) -> np.ndarray:
    """Cost of one group, in query-key pairs: ``g * g + linear * g``.

    Args:
        group_size: Slots ``g`` of the group, a number or an array of them.
        linear: What a slot costs besides its pairs (gathering queries, keys and values and
            putting the result back), in units of one pair. 32, the head width of every Swin, is
            an estimate and not a measurement.
    """
    return group_size * group_size + linear * group_size


def pack_windows(sizes: Sequence[int], group_size: int) -> list[list[int]]:
    """Pack windows into groups by repeated subset-sum.

    Each group is filled as full as any choice of the remaining windows can, preferring large
    windows; then its windows are removed. This is the 0/1 knapsack whose values equal its
    weights. Reachable fills are the bits of one Python integer, so adding windows is a shift.
    Windows of one size are alike: they enter in chunks of 1, 2, 4, ..., and a fill that was best
    once stays best while enough windows for it remain, so it is used again without a new search.

    Args:
        sizes: Tokens of each window, all in ``[1, group_size]``.
        group_size: Slots of a group.

    Returns:
        For every group the indices into ``sizes``; every index occurs once.

    Raises:
        ValueError: If a window is empty or larger than a group.
    """
    if len(sizes) and not (0 < min(sizes) and max(sizes) <= group_size):
        raise ValueError(
            f'window sizes must lie in [1, group_size={group_size}], got sizes from '
            f'{min(sizes)} to {max(sizes)}'
        )
    members: dict[int, list[int]] = {}
    for index, size in enumerate(sizes):
        members.setdefault(int(size), []).append(index)
    groups = []
    for fill, repeats in _fills({size: len(m) for size, m in members.items()}, group_size):
        for _ in range(repeats):
            groups.append([members[size].pop() for size, n in fill.items() for _ in range(n)])
    return groups


def _fills(counts: dict[int, int], group_size: int) -> list[tuple[dict[int, int], int]]:
    """Best fills in order: ``({window size: how many}, repeated how often)``."""
    remaining = dict(sorted(counts.items()))
    fills = []
    while remaining:
        fill = _fullest(remaining, group_size)
        repeats = min(remaining[size] // n for size, n in fill.items())
        for size, n in fill.items():
            remaining[size] -= n * repeats
            if not remaining[size]:
                del remaining[size]
        fills.append((fill, repeats))
    return fills


def _fullest(remaining: dict[int, int], group_size: int) -> dict[int, int]:
    """The fullest group that can be made; ``remaining`` maps size -> count, ascending."""
    limit = (1 << (group_size + 1)) - 1
    reach = 1  # bit s is set where a fill of s slots is reachable
    items = []  # (size, chunk, reachable before the chunk)
    for size, count in remaining.items():
        count = min(count, group_size // size)
        chunk = 1
        while count:
            chunk = min(chunk, count)
            items.append((size, chunk, reach))
            reach |= (reach << (size * chunk)) & limit
            count -= chunk
            chunk *= 2
    left = reach.bit_length() - 1
    fill: Counter[int] = Counter()
    for size, chunk, before in reversed(items):
        rest = left - size * chunk
        if rest >= 0 and before >> rest & 1:  # large windows first: small ones fit in anywhere
            fill[size] += chunk
            left = rest
    return dict(fill)


def group_windows(
    sizes: Sequence[int] | np.ndarray,
    cost: Callable[[np.ndarray], np.ndarray] = attention_cost,
) -> Grouping:
    """Choose the group size and the packing of least cost (GreenMIM, optimal grouping).

    Every group size from the largest window up is considered, the most promising first. The
    search ends where even perfectly full groups would cost more than the best packing found.

    Args:
        sizes: Tokens of each window, ``(num_windows,)``, all positive.
        cost: Cost of one group for an array of group sizes. The total is
            ``num_groups * cost(g)``.

    Returns:
        The cheapest packing; the smallest group size wins a tie.

    Raises:
        ValueError: If there is no window or an empty one.
    """
    sizes = [int(size) for size in sizes]
    if not sizes or min(sizes) < 1:
        raise ValueError(f'group_windows needs windows of at least one token, got sizes {sizes}')
    counts = dict(Counter(sizes))
    total = sum(sizes)
    candidates = np.arange(max(sizes), total + 1)
    costs = cost(candidates)
    bounds = -(-total // candidates) * costs  # what perfectly full groups would cost
    best_cost, best_size = float('inf'), 0
    for index in np.argsort(bounds, kind='stable'):
        if bounds[index] > best_cost:
            break
        group_size = int(candidates[index])
        num_groups = sum(repeats for _, repeats in _fills(counts, group_size))
        best_cost, best_size = min(
            (best_cost, best_size), (float(num_groups * costs[index]), group_size)
        )
    groups = pack_windows(sizes, best_size)
    return Grouping(best_size, tuple(map(tuple, groups)), best_cost)
