"""Relative position bias tables and the windows that they cover."""

from torch import Tensor
from torch.nn import functional as F


def resize_bias_table(table: Tensor, length: int) -> Tensor:
    """Resize a relative position bias table to another window, bicubically as mmdet does.

    Args:
        table: ``((2 * w - 1) ** 2, heads)``.
        length: Rows of the result, an odd square.

    Returns:
        ``(length, heads)`` in the dtype of ``table``.

    Raises:
        ValueError: If either length is not the square of an odd number.
    """
    old, new = (2 * table_window(t) - 1 for t in (table, table.new_empty(length, 0)))
    image = table.float().t().reshape(1, -1, old, old)
    image = F.interpolate(image, size=(new, new), mode='bicubic', align_corners=False)
    return image.reshape(-1, length).t().contiguous().to(table.dtype)


def table_window(table: Tensor) -> int:
    """Side ``w`` of the window that a bias table covers.

    Raises:
        ValueError: If the table does not have ``(2 * w - 1) ** 2`` rows.
    """
    side = round(table.shape[0] ** 0.5) if table.ndim == 2 else 0
    if side % 2 == 0 or side**2 != table.shape[0]:
        raise ValueError(
            'a relative position bias table has shape ((2 * window_size - 1) ** 2, heads), '
            f'not {tuple(table.shape)}'
        )
    return (side + 1) // 2
