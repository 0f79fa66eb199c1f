"""Masking, token layout, window grouping and group attention: torch and numpy only."""

from .attention import BACKENDS, group_attention
from .bias_table import resize_bias_table, table_window
from .cosine import coords_windows, cosine_scale, log_spaced_offsets
from .grouping import Grouping, attention_cost, group_windows, pack_windows
from .layout import StageTokens, merge_cells, take_units, to_device, visible_patches, visible_tokens
from .masking import (
    UNIT_SIZE,
    UnitMask,
    as_unit_mask,
    check_mask_ratio,
    mask_generator,
    random_mask,
    unit_grid,
)
from .plans import (
    AttentionPlan,
    GroupPlan,
    PlanCache,
    PlanPair,
    WindowGrid,
    attention_plan,
    dense_plan,
    grouped_plan,
    plan_pair,
    relative_position_index,
    window_grid,
)
from .recompute import gelu_linear, norm_linear, recompute_obstacle, without_autocast

__all__ = [
    'BACKENDS',
    'UNIT_SIZE',
    'AttentionPlan',
    'GroupPlan',
    'Grouping',
    'PlanCache',
    'PlanPair',
    'StageTokens',
    'UnitMask',
    'WindowGrid',
    'as_unit_mask',
    'attention_cost',
    'attention_plan',
    'check_mask_ratio',
    'coords_windows',
    'cosine_scale',
    'dense_plan',
    'gelu_linear',
    'group_attention',
    'group_windows',
    'grouped_plan',
    'log_spaced_offsets',
    'mask_generator',
    'merge_cells',
    'norm_linear',
    'pack_windows',
    'plan_pair',
    'random_mask',
    'recompute_obstacle',
    'relative_position_index',
    'resize_bias_table',
    'table_window',
    'take_units',
    'to_device',
    'unit_grid',
    'visible_patches',
    'visible_tokens',
    'window_grid',
    'without_autocast',
]
