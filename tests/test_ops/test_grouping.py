"""Packing windows into groups: valid, optimal in the paper's sense, as good as a plain knapsack."""

import itertools

import numpy as np
import pytest

from greenmim_mm.ops import attention_cost, group_windows, pack_windows


def knapsack_groups(sizes: list[int], group_size: int) -> int:
    """Groups that repeated 0/1 knapsack with a two-dimensional table needs."""
    left = list(range(len(sizes)))
    groups = 0
    while left:
        best = [[0] * (group_size + 1)]
        for index in left:
            row = best[-1]
            size = sizes[index]
            best.append(
                [max(v, row[c - size] + size) if c >= size else v for c, v in enumerate(row)]
            )
        capacity, taken = group_size, set()
        for step in range(len(left), 0, -1):
            if best[step][capacity] != best[step - 1][capacity]:
                taken.add(left[step - 1])
                capacity -= sizes[left[step - 1]]
        left = [index for index in left if index not in taken]
        groups += 1
    return groups


def check_packing(groups, sizes, group_size):
    """Every window once, no group over its size."""
    assert sorted(itertools.chain(*groups)) == list(range(len(sizes)))
    assert all(sum(sizes[index] for index in group) <= group_size for group in groups)


def test_worked_example():
    groups = pack_windows([3, 2, 4], 5)
    check_packing(groups, [3, 2, 4], 5)
    assert sorted(sorted(group) for group in groups) == [[0, 1], [2]]


def test_first_group_is_as_full_as_can_be():
    """Against all subsets, on random small cases."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        sizes = rng.integers(1, 13, rng.integers(1, 9)).tolist()
        group_size = int(rng.integers(max(sizes), 25))
        sums = {
            sum(subset)
            for count in range(len(sizes) + 1)
            for subset in itertools.combinations(sizes, count)
        }
        groups = pack_windows(sizes, group_size)
        check_packing(groups, sizes, group_size)
        fullest = max(sum(sizes[index] for index in group) for group in groups)
        assert fullest == max(total for total in sums if total <= group_size)


def test_no_more_groups_than_a_table_filling_knapsack():
    """In total over 1,000 random masks; windows as a quarter of visible tokens makes them."""
    rng = np.random.default_rng(1)
    ours = theirs = 0
    for _ in range(1000):
        sizes = rng.binomial(49, rng.uniform(0.1, 0.9), rng.integers(1, 26))
        sizes = sizes[sizes > 0].tolist() or [1]
        group_size = max(sizes) + int(rng.integers(0, 20))
        groups = pack_windows(sizes, group_size)
        check_packing(groups, sizes, group_size)
        ours += len(groups)
        theirs += knapsack_groups(sizes, group_size)
    assert ours <= theirs


def test_chosen_cost_is_the_least_over_all_sizes():
    rng = np.random.default_rng(2)
    for cost in (attention_cost, lambda g: g * g, lambda g: 100 * (g % 7) + g):
        for _ in range(100):
            sizes = rng.integers(1, 20, rng.integers(1, 15)).tolist()
            best = group_windows(sizes, cost)
            check_packing(best.groups, sizes, best.group_size)
            costs = [
                len(pack_windows(sizes, size)) * cost(size)
                for size in range(max(sizes), sum(sizes) + 1)
            ]
            assert best.cost == min(costs)
            assert best.cost == len(best.groups) * cost(best.group_size)


def test_equal_windows_fill_groups_exactly():
    best = group_windows([49] * 64)
    assert best.group_size == 49 and len(best.groups) == 64


def test_single_window():
    assert group_windows([5]).groups == ((0,),)


@pytest.mark.parametrize('sizes', [[], [0, 3], [-1]])
def test_empty_windows_are_refused(sizes):
    with pytest.raises(ValueError, match='at least one token'):
        group_windows(sizes)


def test_window_larger_than_group_is_refused():
    with pytest.raises(ValueError, match='group_size=5'):
        pack_windows([3, 6], 5)
