"""Checkpoint files and formats: reading, converting, writing. torch only."""

from .convert import (
    ConversionReport,
    convert_file,
    convert_state_dict,
    convert_with_report,
    resize_bias_table,
)
from .files import (
    CheckpointError,
    atomic_path,
    check_destination,
    find_state_dict,
    load_backbone_state_dict,
    load_model_state_dict,
    read_checkpoint,
    write_checkpoint,
)
from .formats import FORMATS, detect_format

__all__ = [
    'FORMATS',
    'CheckpointError',
    'ConversionReport',
    'atomic_path',
    'check_destination',
    'convert_file',
    'convert_state_dict',
    'convert_with_report',
    'detect_format',
    'find_state_dict',
    'load_backbone_state_dict',
    'load_model_state_dict',
    'read_checkpoint',
    'resize_bias_table',
    'write_checkpoint',
]
