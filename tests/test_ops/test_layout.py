"""Token order, patches and units, against plain loops."""

import numpy as np
import pytest
import torch

from greenmim_mm.ops import (
    UnitMask,
    layout,
    merge_cells,
    random_mask,
    take_units,
    visible_patches,
    visible_tokens,
)


def test_visible_tokens_are_nested():
    """Four successive tokens are one 2x2 cell, row by row, at every stage."""
    mask = UnitMask((3, 4), random_mask(12, 0.5, np.random.default_rng(0)))
    stages = visible_tokens(mask)
    assert [len(stage.coords) for stage in stages] == [6 * 64, 6 * 16, 6 * 4, 6]
    for fine, coarse in zip(stages, stages[1:], strict=False):
        cells = fine.coords.reshape(-1, 4, 2)
        expected = coarse.coords[:, None] * 2 + np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
        np.testing.assert_array_equal(cells, expected)
    units = np.stack(np.divmod(mask.visible_units, 4), axis=-1)
    np.testing.assert_array_equal(stages[-1].coords, units)


def test_visible_patches_lie_where_the_tokens_do():
    mask = UnitMask((2, 3), random_mask(6, 0.5, np.random.default_rng(0)))
    images = torch.rand(2, 3, 64, 96)
    patches = visible_patches(images, mask)
    tokens = visible_tokens(mask)[0]
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


def test_take_units():
    images = torch.rand(2, 3, 64, 96)
    units = take_units(images, np.array([5, 1]))
    assert units.shape == (2, 2, 3, 32, 32)
    assert torch.equal(units[:, 0], images[:, :, 32:, 64:])
    assert torch.equal(units[:, 1], images[:, :, :32, 32:64])


def test_arrays_in_one_copy():
    """Kinds and shapes as given, each begun where kernels like it."""
    arrays = [
        np.arange(5),
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.arange(12).reshape(3, 4).T,
        np.array([True, False, True]),
        np.empty((0, 2), np.int64),
        np.arange(3),
    ]
    tensors = layout._in_one_copy(arrays, torch.device('cpu'), pinned=False)
    plain = layout.to_device(arrays, torch.device('cpu'))
    for array, *found in zip(arrays, tensors, plain, strict=True):
        for tensor in found:
            assert tensor.dtype == torch.from_numpy(array).dtype
            np.testing.assert_array_equal(tensor.numpy(), array)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    for tensor in tensors:
        assert tensor.is_contiguous()
        assert tensor.storage_offset() * tensor.element_size() % 16 == 0
    tensors[0].fill_(-1)
    assert tensors[1].flatten().tolist() == list(range(6))


def test_one_copy_inside_a_transform():
    def chosen(x):
        (index,) = layout._in_one_copy([np.array([2, 0])], x.device, pinned=False)
        return x.index_select(0, index).sum()

    assert torch.func.grad(chosen)(torch.ones(3)).tolist() == [1, 0, 1]
