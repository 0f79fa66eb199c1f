"""Planning: the baseline is a knapsack, and the counts are right."""

from itertools import combinations

import numpy as np
import pytest

from greenmim_mm.benchmark import grouping
from greenmim_mm.benchmark.grouping import GroupingResult, run, table_filling_packs, tables
from greenmim_mm.ops import pack_windows


@pytest.mark.parametrize('seed', range(20))
def test_each_group_is_as_full_as_can_be(seed):
    rng = np.random.default_rng(seed)
    group_size = int(rng.integers(6, 15))
    sizes = rng.integers(1, group_size + 1, size=8).tolist()
    groups = table_filling_packs(sizes, group_size)
    assert sorted(index for group in groups for index in group) == list(range(8))
    left = set(range(8))
    for group in groups:
        fills = (
            sum(sizes[i] for i in chosen)
            for n in range(1, len(left) + 1)
            for chosen in combinations(left, n)
        )
        assert sum(sizes[i] for i in group) == max(f for f in fills if f <= group_size)
        left -= set(group)


def test_no_windows_need_no_groups():
    assert table_filling_packs([], 5) == []


def test_growth_is_counted():
    results, lines = [], []
    run(results, lines.append, pixels=(224, 448), repeats=3, table_limit=224)
    small, large = results
    # Stages of 14, 7 ... tokens a side, a quarter of the units: 12 of 49, and 49 of 196.
    assert (small.tokens, large.tokens) == (12 * 64, 49 * 64)
    # At 224 pixels the last stage is one window and shifts nothing: seven plans, 12 units each.
    assert small.filled == 3 * 12 * (2 * (64 + 16 + 4) + 1)
    assert small.filled <= small.slots
    assert len(small.seconds) == len(small.table_seconds) == len(large.seconds) == 3
    assert large.table_seconds == []
    assert large.note == 'table-filling skipped above 224 px'
    assert len(lines) == 6


def test_our_groups_and_the_baseline_pack_the_same_windows(monkeypatch):
    seen = []

    def spy(sizes, group_size):
        seen.append((sizes, group_size))
        return pack_windows(sizes, group_size)

    monkeypatch.setattr(grouping, 'table_filling_packs', spy)
    results = []
    run(results, lambda line: None, pixels=(224,), repeats=1)
    assert len(seen) == 7
    assert sum(sum(sizes) for sizes, _ in seen) == results[0].filled
    assert results[0].table_groups > 0


def test_table_of_medians():
    result = GroupingResult('64 px', 64, [0.003, 0.001, 0.002], [0.001] * 3, [0.04, 0.02, 0.03])
    result.groups, result.table_groups, result.filled, result.slots = 30, 33, 90, 100
    head, _, row = tables([result]).splitlines()
    cells = dict(zip(head.split(' | '), row.split(' | '), strict=True))
    assert cells['planning a step'] == '2.0 ms'
    assert cells['groups by table-filling'] == '30.0 ms'
    assert cells['groups'] == '10.0'
    assert cells['slots filled'] == '90.0%'
    assert '30.0x' in row
