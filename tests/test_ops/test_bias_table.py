"""Relative position bias tables and the windows that they cover."""

import pytest
import torch

from greenmim_mm.ops import resize_bias_table, table_window


@pytest.mark.parametrize('shape, rows', [((8, 2), 9), ((9, 2), 16), ((9,), 25), ((16, 2), 25)])
def test_resize_bias_table_refuses(shape, rows):
    with pytest.raises(ValueError, match='bias table'):
        resize_bias_table(torch.zeros(shape), rows)


def test_resize_bias_table_keeps_dtype():
    table = torch.rand(25, 3).half()
    assert torch.equal(resize_bias_table(table, 25), table)
    assert resize_bias_table(table, 49).dtype == torch.float16


@pytest.mark.parametrize('window', [1, 2, 7, 12])
def test_table_window(window):
    assert table_window(torch.zeros((2 * window - 1) ** 2, 3)) == window
