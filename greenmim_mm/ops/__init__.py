"""Masking, token layout, window grouping and group attention: torch and numpy only."""

from .attention import BACKENDS, AttentionPlan, group_attention, relative_position_index
from .bias_table import resize_bias_table, table_window
from .cosine import coords_windows, cosine_qkv, log_spaced_offsets
from .grouping import Grouping, attention_cost, group_windows, pack_windows
from .layout import (
    GroupPlan,
    StageTokens,
    WindowGrid,
    dense_plan,
    grouped_plan,
    merge_cells,
    to_device,
    visible_patches,
    visible_tokens,
    window_grid,
)
from .masking import (
    UNIT_SIZE,
    as_unit_mask,
    check_mask_ratio,
    mask_generator,
    random_mask,
    unit_grid,
)
from .recompute import gelu_linear, norm_linear, norm_mlp

__all__ = [
    'BACKENDS',
    'UNIT_SIZE',
    'AttentionPlan',
    'GroupPlan',
    'Grouping',
    'StageTokens',
    'WindowGrid',
    'as_unit_mask',
    'attention_cost',
    'check_mask_ratio',
    'coords_windows',
    'cosine_qkv',
    'dense_plan',
    'gelu_linear',
    'group_attention',
    'group_windows',
    'grouped_plan',
    'log_spaced_offsets',
    'mask_generator',
    'merge_cells',
    'norm_linear',
    'norm_mlp',
    'pack_windows',
    'random_mask',
    'relative_position_index',
    'resize_bias_table',
    'table_window',
    'to_device',
    'unit_grid',
    'visible_patches',
    'visible_tokens',
    'window_grid',
]
