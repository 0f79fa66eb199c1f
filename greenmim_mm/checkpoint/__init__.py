"""Checkpoint files and formats: reading, converting, writing, comparing.

Needs torch and safetensors alone; :func:`verify` imports the libraries that it compares with.
"""

from .architecture import Architecture, check_finite, infer_architecture
from .convert import (
    ConversionReport,
    canonical_state_dict,
    convert_state_dict,
    convert_with_report,
    resize_bias_table,
)
from .file_conversion import FileConversion, LossError, convert_file
from .files import (
    Checkpoint,
    find_state_dict,
    load_backbone_state_dict,
    load_checkpoint,
    load_model_state_dict,
    save_checkpoint,
)
from .formats import FORMATS, detect_format, detect_version
from .inspection import Inspection, inspect_checkpoint
from .reading import CheckpointError, read_checkpoint
from .verification import Verification, VerificationError, verify
from .writing import atomic_path, check_destination, write_checkpoint

__all__ = [
    'FORMATS',
    'Architecture',
    'Checkpoint',
    'CheckpointError',
    'ConversionReport',
    'FileConversion',
    'Inspection',
    'LossError',
    'Verification',
    'VerificationError',
    'atomic_path',
    'canonical_state_dict',
    'check_destination',
    'check_finite',
    'convert_file',
    'convert_state_dict',
    'convert_with_report',
    'detect_format',
    'detect_version',
    'find_state_dict',
    'infer_architecture',
    'inspect_checkpoint',
    'load_backbone_state_dict',
    'load_checkpoint',
    'load_model_state_dict',
    'read_checkpoint',
    'resize_bias_table',
    'save_checkpoint',
    'verify',
    'write_checkpoint',
]
