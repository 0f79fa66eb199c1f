"""Checkpoint files and formats as one pipeline, torch and safetensors alone.

A file becomes a :class:`Network` (``network``), which is resized, spelled in the
names of a format (``spelling``) and written (``writing``); :func:`convert_file` goes the whole way.
What proves that the result is the same network is handed to it: :mod:`greenmim_mm.verification`.
"""

from .architecture import Architecture, check_finite, infer_architecture
from .building import Call, build_call, build_line
from .convert import (
    FileConversion,
    LossError,
    convert_file,
    convert_state_dict,
    convert_with_report,
)
from .formats import AUTO, FORMATS, detect_format, find_format
from .huggingface import check_settings
from .inspection import Inspection, inspect_checkpoint
from .loading import fetch, load_backbone_state_dict, load_model_state_dict
from .network import Network, network_of, read_network, resize
from .reading import (
    Checkpoint,
    CheckpointError,
    find_state_dict,
    load_checkpoint,
    read_checkpoint,
)
from .spelling import ConversionReport, spell
from .writing import save_checkpoint

__all__ = [
    'AUTO',
    'FORMATS',
    'Architecture',
    'Call',
    'Checkpoint',
    'CheckpointError',
    'ConversionReport',
    'FileConversion',
    'Inspection',
    'LossError',
    'Network',
    'build_call',
    'build_line',
    'check_finite',
    'check_settings',
    'convert_file',
    'convert_state_dict',
    'convert_with_report',
    'detect_format',
    'fetch',
    'find_format',
    'find_state_dict',
    'infer_architecture',
    'inspect_checkpoint',
    'load_backbone_state_dict',
    'load_checkpoint',
    'load_model_state_dict',
    'network_of',
    'read_checkpoint',
    'read_network',
    'resize',
    'save_checkpoint',
    'spell',
]
