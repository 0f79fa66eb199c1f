"""Window cuts and plans, against plain loops."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from greenmim_mm.ops import (
    PlanCache,
    StageTokens,
    UnitMask,
    attention_plan,
    dense_plan,
    grouped_plan,
    plan_pair,
    random_mask,
    visible_tokens,
    window_grid,
)


def swin_windows(grid, window, shift):
    """Window of every cell of the padded grid, from Swin's roll and region mask."""
    rows, columns = (-(-side // window) * window for side in grid)
    region = np.zeros((rows, columns), dtype=int)
    slices = (
        [slice(0, -window), slice(-window, -shift), slice(-shift, None)]
        if shift
        else [slice(0, None)]
    )
    for count, (row, column) in enumerate((r, c) for r in slices for c in slices):
        region[row, column] = count
    block = np.add.outer(np.arange(rows) // window * 1000, np.arange(columns) // window)
    return np.roll(region * 1000000 + block, (shift, shift), axis=(0, 1))


def same_partition(a, b):
    """Whether two labellings put the same things together."""
    pairs = set(zip(a.ravel().tolist(), b.ravel().tolist(), strict=True))
    return len(pairs) == len(np.unique(a)) == len(np.unique(b))


@pytest.mark.parametrize('grid', [(14, 14), (8, 13), (7, 7), (5, 20)])
@pytest.mark.parametrize('window', [4, 7])
@pytest.mark.parametrize('shifted', [False, True])
def test_window_ids_are_those_of_the_cyclic_shift(grid, window, shifted):
    cut = window_grid(grid, window, shifted, pad_small_map=True)
    cells = np.stack(np.mgrid[: cut.padded[0], : cut.padded[1]], axis=-1)
    expected = swin_windows(grid, window, window // 2 if shifted else 0)
    assert same_partition(cut.window_ids(cells), expected)


@pytest.mark.parametrize('shifted', [False, True])
@pytest.mark.parametrize(
    ('grid', 'window', 'expected'),
    [
        # Written down by hand from Swin's rule: the smaller side is both sides of the window.
        ((2, 6), 4, [[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2]]),
        ((2, 5), 2, [[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2]]),  # one column of padding
        ((3, 1), 7, [[0], [1], [2]]),
        ((2, 2), 2, [[0, 0], [0, 0]]),
    ],
)
def test_small_map_shrinks_the_window(grid, window, expected, shifted):
    cut = window_grid(grid, window, shifted)
    cells = np.stack(np.mgrid[: cut.padded[0], : cut.padded[1]], axis=-1)
    assert same_partition(cut.window_ids(cells), np.array(expected))


@pytest.mark.parametrize('units', [(2, 2), (3, 5), (1, 4)])
@pytest.mark.parametrize('window', [4, 7, 12])
@pytest.mark.parametrize('shifted', [False, True])
@pytest.mark.parametrize('pad_small_map', [False, True])
@pytest.mark.parametrize('ratio', [0.1, 0.75, 0.95])
def test_grouped_plan_holds_every_token_once(units, window, shifted, pad_small_map, ratio):
    mask = UnitMask(units, random_mask(units[0] * units[1], ratio, np.random.default_rng(3)))
    for tokens in visible_tokens(mask):
        cut = window_grid(tokens.grid, window, shifted, pad_small_map)
        plan = grouped_plan(tokens, cut)
        num_tokens = len(tokens.coords)
        used = plan.window.ravel() >= 0
        real = used & (plan.token.ravel() < num_tokens)
        assert sorted(plan.token.ravel()[real].tolist()) == list(range(num_tokens))
        np.testing.assert_array_equal(plan.token.ravel()[plan.slot], np.arange(num_tokens))
        np.testing.assert_array_equal(plan.coords.reshape(-1, 2)[plan.slot], tokens.coords)
        np.testing.assert_array_equal(
            plan.window.ravel()[used], cut.window_ids(plan.coords.reshape(-1, 2)[used])
        )
        # No window in two groups.
        group = np.repeat(np.arange(len(plan.token)), plan.token.shape[1])
        homes = {(w, g) for w, g in zip(plan.window.ravel()[used], group[used], strict=True)}
        assert len({window for window, _ in homes}) == len(homes)
        # Swin's padding tokens: all those of the windows that are seen, and no others.
        cells = np.stack(np.mgrid[: cut.padded[0], : cut.padded[1]], axis=-1).reshape(-1, 2)
        outside = (cells >= cut.grid).any(axis=1)
        seen = np.isin(cut.window_ids(cells), np.unique(cut.window_ids(tokens.coords)))
        padding = plan.coords.reshape(-1, 2)[used & ~real]
        assert sorted(map(tuple, padding)) == sorted(map(tuple, cells[outside & seen]))


@pytest.mark.parametrize('grid', [(14, 14), (8, 13), (3, 5)])
@pytest.mark.parametrize('shifted', [False, True])
@pytest.mark.parametrize('pad_small_map', [False, True])
def test_dense_plan_agrees_with_grouped_plan_of_all_tokens(grid, shifted, pad_small_map):
    """The same partition of tokens and padding into windows."""
    cut = window_grid(grid, 4, shifted, pad_small_map)
    coords = np.stack(np.mgrid[: grid[0], : grid[1]], axis=-1).reshape(-1, 2)

    def members(plan):
        result = {}
        for token, window in zip(plan.token.flatten(), plan.window.flatten(), strict=True):
            if window >= 0:
                result.setdefault(int(window), []).append(int(token))
        return {window: sorted(tokens) for window, tokens in result.items()}

    dense = dense_plan(cut, 4, torch.device('cpu'))
    grouped = grouped_plan(StageTokens(coords, grid), cut)
    dense_members = members(dense)
    # Windows of padding alone are computed by the dense network, and read by nobody.
    num_tokens = len(coords)
    dense_members = {w: m for w, m in dense_members.items() if min(m) < num_tokens}
    assert dense_members == members(grouped)
    assert torch.equal(dense.token[dense.slot], torch.arange(num_tokens))
    # The slots of padding are known without a search.
    if dense.padding is None:
        assert (dense.token < num_tokens).all()
    else:
        assert (
            sorted(dense.padding.tolist()) == (dense.token == num_tokens).nonzero()[:, 0].tolist()
        )


def test_cache_is_bounded_by_memory():
    def pair(side):
        return plan_pair(
            lambda cut: dense_plan(cut, 4, torch.device('cpu')), (side, side), 4, False
        )

    size = pair(16)[0].num_bytes + pair(16)[1].num_bytes
    cache = PlanCache(max_bytes=int(2.5 * size))
    first = cache.get('a', lambda: pair(16))
    cache.get('b', lambda: pair(16))
    assert cache.get('a', lambda: pair(16)) is first and cache.num_bytes == 2 * size
    cache.get('c', lambda: pair(16))  # the least recently used, b, goes
    assert cache.num_bytes == 2 * size and cache.get('a', lambda: pair(16)) is first
    # A map whose windows do not shift has one plan, which is counted once.
    cache = PlanCache(max_bytes=10**6)
    cache.get('small', lambda: pair(4))
    assert cache.num_bytes == pair(4)[0].num_bytes
    # What is too large alone is used, and not kept.
    cache = PlanCache(max_bytes=10)
    assert cache.get('large', lambda: pair(64))[0].num_rows == 64**2
    assert cache.num_bytes == 0


@pytest.mark.parametrize('shifted', [False, True])
def test_a_plan_takes_few_launches(shifted):
    """The rest is done before it is copied: on a GPU a launch costs more than such small work."""
    tokens = visible_tokens(UnitMask((7, 7), random_mask(49, 0.75, np.random.default_rng(0))))[0]
    groups = grouped_plan(tokens, window_grid(tokens.grid, 7, shifted))
    called = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Count():
        plan = attention_plan(groups, 7, torch.device('cpu'))
    views = {'detach', 'lift_fresh', 'unbind', 'unsqueeze', 'slice', 'select', 'alias'}
    work = [name for name in called if name not in views]
    assert work == ['sub', *(['ne', 'masked_fill'] if plan.blocked is not None else [])]
