"""Token order, window cuts and plans, against plain loops."""

import numpy as np
import pytest
import torch

from greenmim_mm.ops import (
    StageTokens,
    dense_plan,
    grouped_plan,
    merge_cells,
    random_mask,
    visible_patches,
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


def test_small_map_shrinks_the_window():
    cut = window_grid((7, 12), 7, shifted=True)
    assert cut.window == (7, 7) and cut.shift == (0, 0)
    cut = window_grid((4, 12), 7, shifted=True)
    assert cut.window == (4, 7) and cut.shift == (0, 0)


def test_visible_tokens_are_nested():
    """Four successive tokens are one 2x2 cell, row by row, at every stage."""
    mask = random_mask(12, 0.5, np.random.default_rng(0))
    stages = visible_tokens(mask, (3, 4))
    assert [len(stage.coords) for stage in stages] == [6 * 64, 6 * 16, 6 * 4, 6]
    for fine, coarse in zip(stages, stages[1:], strict=False):
        cells = fine.coords.reshape(-1, 4, 2)
        expected = coarse.coords[:, None] * 2 + np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
        np.testing.assert_array_equal(cells, expected)
    units = np.stack(np.divmod(np.flatnonzero(~mask), 4), axis=-1)
    np.testing.assert_array_equal(stages[-1].coords, units)


def test_visible_patches_lie_where_the_tokens_do():
    mask = random_mask(6, 0.5, np.random.default_rng(0))
    images = torch.rand(2, 3, 64, 96)
    patches = visible_patches(images, mask)
    tokens = visible_tokens(mask, (2, 3))[0]
    assert patches.shape == (2, len(tokens.coords), 48)
    for index, (row, column) in enumerate(tokens.coords.tolist()):
        patch = images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        assert torch.equal(patches[:, index], patch.flatten(1))


@pytest.mark.parametrize('grid', [(4, 6), (5, 7), (1, 3)])
def test_merge_cells(grid):
    rows, columns = grid
    x = torch.rand(2, rows * columns, 3)
    cells, merged = merge_cells(x, grid)
    padded = torch.zeros(2, rows + rows % 2, columns + columns % 2, 3)
    padded[:, :rows, :columns] = x.view(2, rows, columns, 3)
    assert merged == ((rows + 1) // 2, (columns + 1) // 2)
    for index, (row, column) in enumerate(np.ndindex(*merged)):
        square = padded[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.equal(cells[:, index], square.flatten(1))


@pytest.mark.parametrize('units', [(2, 2), (3, 5), (1, 4)])
@pytest.mark.parametrize('window', [4, 7, 12])
@pytest.mark.parametrize('shifted', [False, True])
@pytest.mark.parametrize('pad_small_map', [False, True])
@pytest.mark.parametrize('ratio', [0.1, 0.75, 0.95])
def test_grouped_plan_holds_every_token_once(units, window, shifted, pad_small_map, ratio):
    mask = random_mask(units[0] * units[1], ratio, np.random.default_rng(3))
    for tokens in visible_tokens(mask, units):
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
        for token, window in zip(plan.token.ravel(), plan.window.ravel(), strict=True):
            if window >= 0:
                result.setdefault(int(window), []).append(int(token))
        return {window: sorted(tokens) for window, tokens in result.items()}

    dense, grouped = dense_plan(cut), grouped_plan(StageTokens(coords, grid), cut)
    dense_members = members(dense)
    # Windows of padding alone are computed by the dense network, and read by nobody.
    num_tokens = len(coords)
    dense_members = {w: m for w, m in dense_members.items() if min(m) < num_tokens}
    assert dense_members == members(grouped)
    np.testing.assert_array_equal(dense.token.ravel()[dense.slot], np.arange(num_tokens))
