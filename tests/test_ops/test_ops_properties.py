"""What holds for every mask, size, window and plan, on drawn examples."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from greenmim_mm.ops import (
    UNIT_SIZE,
    as_unit_mask,
    attention_cost,
    group_windows,
    grouped_plan,
    merge_cells,
    pack_windows,
    random_mask,
    resize_bias_table,
    table_window,
    take_units,
    unit_grid,
    visible_patches,
    visible_tokens,
    window_grid,
)

SIDES = st.integers(1, 6)
WINDOWS = st.integers(1, 16)


@st.composite
def masks(draw):
    """A mask that leaves something visible, for a grid of its own."""
    rows, columns = draw(SIDES), draw(SIDES)
    hidden = draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    hidden[draw(st.integers(0, rows * columns - 1))] = False
    return as_unit_mask(np.array(hidden), (rows, columns))


@given(st.integers(2, 500), st.floats(0, 1, exclude_min=True, exclude_max=True), st.integers(0))
def test_a_mask_hides_its_share(num_units, ratio, seed):
    mask = random_mask(num_units, ratio, np.random.default_rng(seed))
    assert mask.dtype == np.bool_ and mask.shape == (num_units,)
    visible = num_units - int(mask.sum())
    exact = num_units * (1 - Fraction(ratio))
    assert 1 <= visible <= num_units - 1
    assert visible in (1, num_units - 1) or abs(visible - exact) <= 1
    np.testing.assert_array_equal(mask, random_mask(num_units, ratio, np.random.default_rng(seed)))


@given(masks(), st.integers(1, 3))
def test_units_are_visible_or_hidden(mask, batch):
    units = np.concatenate([mask.visible_units, mask.hidden_units])
    assert sorted(units) == list(range(len(mask.hidden)))
    assert not mask.hidden[mask.visible_units].any() and mask.hidden[mask.hidden_units].all()
    rows = torch.from_numpy(mask.hidden)[None].expand(batch, -1)
    for form in (mask, rows, rows.numpy(), rows[:1], rows[0]):
        found = as_unit_mask(form, mask.grid, batch)
        assert found.grid == mask.grid and (found.hidden == mask.hidden).all()


@given(masks(), st.integers(1, 9), st.integers(1, 9))
def test_masks_of_another_size_are_refused(mask, rows, columns):
    if (rows, columns) != mask.grid:
        with pytest.raises(ValueError, match='mask'):
            as_unit_mask(mask, (rows, columns))
    if rows * columns != len(mask.hidden):
        with pytest.raises(ValueError, match=f'{rows} x {columns}'):
            as_unit_mask(mask.hidden, (rows, columns))


@given(st.sampled_from(['uint8', 'int64', 'float32', 'list', 'none', 'str']), SIDES)
def test_masks_of_another_type_are_refused(kind, side):
    mask = {'list': [False] * side, 'none': None, 'str': 'x' * side}.get(kind)
    mask = np.zeros(side, kind) if kind not in ('list', 'none', 'str') else mask
    with pytest.raises(TypeError, match='mask must be a bool'):
        as_unit_mask(mask, (1, side))


@given(st.integers(-64, 400), st.integers(-64, 400))
def test_images_are_made_of_units_or_refused(height, width):
    if height > 0 and width > 0 and height % UNIT_SIZE == width % UNIT_SIZE == 0:
        assert unit_grid(height, width) == (height // UNIT_SIZE, width // UNIT_SIZE)
    else:
        with pytest.raises(ValueError, match=f'image of {height}x{width}'):
            unit_grid(height, width)


@given(masks(), st.sampled_from([2, 4, 8]))
def test_tokens_are_nested(mask, patch_size):
    stages = visible_tokens(mask, patch_size, num_stages=3)
    for tokens, side in zip(stages, (32, 16, 8), strict=True):
        side = side // patch_size
        unit = tokens.coords // side
        number = unit[:, 0] * mask.grid[1] + unit[:, 1]
        assert tokens.grid == (mask.grid[0] * side, mask.grid[1] * side)
        # Each token of each visible unit once, unit by unit.
        assert len(set(map(tuple, tokens.coords))) == len(mask.visible_units) * side**2
        np.testing.assert_array_equal(number, np.repeat(mask.visible_units, side**2))
    for tokens, merged in zip(stages, stages[1:], strict=False):
        cells = tokens.coords.reshape(-1, 4, 2)
        assert (cells // 2 == merged.coords[:, None]).all()
        np.testing.assert_array_equal(cells % 2, np.broadcast_to([[0, 0], [0, 1], [1, 0], [1, 1]],
                                                                 cells.shape))  # fmt: skip


@given(masks(), st.sampled_from([4, 8, 32]))
def test_patches_are_cut_where_their_tokens_lie(mask, patch_size):
    rows, columns = mask.grid
    images = torch.rand(2, 2, rows * UNIT_SIZE, columns * UNIT_SIZE)
    patches = visible_patches(images, mask, patch_size)
    (tokens,) = visible_tokens(mask, patch_size, num_stages=1)
    for number in range(0, len(tokens.coords), 7):
        row, column = (int(n) * patch_size for n in tokens.coords[number])
        pixels = images[:, :, row : row + patch_size, column : column + patch_size]
        assert torch.equal(patches[:, number], pixels.flatten(1))
    units = take_units(images, mask.hidden_units)
    for number, unit in enumerate(mask.hidden_units):
        row, column = (int(n) * UNIT_SIZE for n in divmod(unit, columns))
        pixels = images[:, :, row : row + UNIT_SIZE, column : column + UNIT_SIZE]
        assert torch.equal(units[:, number], pixels)


@given(st.integers(1, 30), st.integers(1, 30), WINDOWS, st.booleans(), st.booleans())
def test_windows_are_rectangles_that_cover_the_map(rows, columns, window, shifted, pad):
    cut = window_grid((rows, columns), window, shifted, pad)
    assert cut.window == window or (not pad and cut.window == min(rows, columns) <= window)
    assert all(padded % cut.window == 0 for padded in cut.padded)
    assert 0 <= cut.padded[0] - rows < cut.window and 0 <= cut.padded[1] - columns < cut.window
    ids = cut.window_ids(np.stack(np.mgrid[: cut.padded[0], : cut.padded[1]], axis=-1))
    for number in np.unique(ids):
        where = np.argwhere(ids == number)
        low, high = where.min(axis=0), where.max(axis=0)
        sides = high - low + 1
        assert sides.prod() == len(where) and sides.max() <= cut.window
        # Only windows at an edge are cut, by the shift.
        inner = (low > 0) & (high < np.array(cut.padded) - 1)
        assert (sides[inner] == cut.window).all()


@given(masks(), WINDOWS, st.booleans(), st.booleans())
def test_plans_hold_every_token_with_its_window_alone(mask, window, shifted, pad):
    for tokens in visible_tokens(mask)[1:]:
        cut = window_grid(tokens.grid, window, shifted, pad)
        plan = grouped_plan(tokens, cut)
        assert plan.num_tokens == len(tokens.coords) == len(set(plan.slot.tolist()))
        np.testing.assert_array_equal(plan.token.ravel()[plan.slot], np.arange(plan.num_tokens))
        np.testing.assert_array_equal(plan.coords.reshape(-1, 2)[plan.slot], tokens.coords)
        group, _ = np.divmod(plan.slot, plan.token.shape[1])
        ids = cut.window_ids(tokens.coords)
        np.testing.assert_array_equal(plan.window.ravel()[plan.slot], ids)
        assert len(set(zip(ids, group, strict=True))) == len(np.unique(ids))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(0, 60))
def test_packing_wastes_no_window_and_no_room(sizes, more):
    group_size = max(sizes) + more
    groups = pack_windows(sizes, group_size)
    assert sorted(index for group in groups for index in group) == list(range(len(sizes)))
    fills = [sum(sizes[index] for index in group) for group in groups]
    reachable = {0}
    for size in sizes:
        reachable |= {total + size for total in reachable if total + size <= group_size}
    assert fills[0] == max(reachable) and max(fills) <= group_size
    # Two groups that fit into one would have been one.
    assert all(a + b > group_size for i, a in enumerate(fills) for b in fills[:i])
    best = group_windows(sizes)
    assert best.cost == len(best.groups) * attention_cost(best.group_size)
    assert best.cost <= min(len(groups) * attention_cost(group_size), attention_cost(sum(sizes)))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3))
def test_merging_takes_cells_of_two_by_two(rows, columns, channels):
    x = torch.rand(2, rows * columns, channels)
    merged, grid = merge_cells(x, (rows, columns))
    assert grid == ((rows + 1) // 2, (columns + 1) // 2)
    for row, column in np.ndindex(*grid):
        parts = [
            x[:, r * columns + c] if r < rows and c < columns else torch.zeros(2, channels)
            for r in (2 * row, 2 * row + 1)
            for c in (2 * column, 2 * column + 1)
        ]
        assert torch.equal(merged[:, row * grid[1] + column], torch.cat(parts, dim=-1))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4))
def test_bias_tables_are_resized(old, new, heads):
    table = torch.rand((2 * old - 1) ** 2, heads)
    result = resize_bias_table(table, (2 * new - 1) ** 2)
    assert table_window(result) == new and result.shape[1] == heads
    if old == new:
        torch.testing.assert_close(result, table)
    # Offsets have a symmetry, which resizing keeps.
    torch.testing.assert_close(
        resize_bias_table(table.flip(0), len(result)).flip(0), result, atol=1e-5, rtol=1e-5
    )
    with pytest.raises(ValueError, match='bias table'):
        table_window(torch.rand((2 * old) ** 2, heads))
