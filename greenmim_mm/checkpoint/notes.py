"""The note of where a file is from, which is written with its parameters and read again.

The parameters of a Swin V2 are the same for every window, but offsets inside a window are scaled by
that of pre-training. Where a file has no buffers, ``config.json`` or the note may tell; what nobody
tells is never guessed in silence.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..version import __version__
from .architecture import Architecture, check_window_size
from .formats import FORMATS
from .reading import Checkpoint

_WINDOWS, _PRETRAINED = 'window_sizes', 'pretrained_window_sizes'

Windows = tuple[int, ...] | None


def make_note(
    checkpoint: Checkpoint, source: str, target: str, architecture: Architecture
) -> dict[str, str]:
    """What a file that is made of ``checkpoint`` says about itself.

    Args:
        checkpoint: The source.
        source: Its format.
        target: Format of the file.
        architecture: The network in the file.
    """
    note = dict(
        source_file=checkpoint.path.name,
        source_sha256=sha256(checkpoint.weights_file),
        source_format=source,
        format=target,
        greenmim_mm_version=__version__,
    )
    if licence := licence_of(checkpoint, source):
        note['licence'] = licence
    # Text, as safetensors takes nothing else.
    if architecture.window_sizes is not None:
        note[_WINDOWS] = _text(architecture.window_sizes)
        if architecture.pretrained_window_sizes is not None:
            note[_PRETRAINED] = _text(architecture.pretrained_window_sizes)
    return note


def windows_in_note(meta: Mapping[str, Any]) -> tuple[Windows, Windows]:
    """Windows in use and windows of pre-training that a note tells; None for what it does not."""
    return _windows(meta.get(_WINDOWS)), _windows(meta.get(_PRETRAINED))


def licence_of(checkpoint: Checkpoint, source: str) -> str | None:
    """Licence note of a checkpoint: its own, or the one that its format implies."""
    return checkpoint.meta.get('licence') or FORMATS[source].licence


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with path.open('rb') as file:
        while length := file.readinto(buffer):
            digest.update(buffer[:length])
    return digest.hexdigest()


def _text(sizes: Sequence[int]) -> str:
    return ','.join(map(str, sizes))


def _windows(text: Any) -> Windows:
    """Windows in a note; None if there are none, or something else has this name."""
    parts = str(text)[:100].split(',')
    if not all(part.isascii() and part.isdigit() for part in parts):
        return None
    try:
        return check_window_size(tuple(map(int, parts)))
    except ValueError:
        return None
