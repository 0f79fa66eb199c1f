"""Windows of a network where its parameters do not tell them all.

The parameters of a Swin V2 are the same for every window, but offsets inside a window are scaled by
that of pre-training. Where a file has no buffers, ``config.json`` or the note that this package
writes may tell; what nobody tells is never guessed in silence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .architecture import Architecture, check_window_size
from .files import Checkpoint
from .huggingface import config_pretrained, config_windows
from .reading import CheckpointError

_WINDOWS, _PRETRAINED = 'window_sizes', 'pretrained_window_sizes'


def with_told_windows(architecture: Architecture, checkpoint: Checkpoint) -> Architecture:
    """The architecture with the windows that ``config.json`` or the note of a checkpoint tell.

    Raises:
        CheckpointError: If ``config.json`` is of another network than a Swin.
        ValueError: If it tells windows that are too large.
    """
    if architecture.version == 1 or architecture.pretraining_told:
        return architecture
    sources = [(_from_note(checkpoint.meta, _WINDOWS), _from_note(checkpoint.meta, _PRETRAINED))]
    if checkpoint.config is not None:
        windows = config_windows(checkpoint.config, architecture.version)
        sources.insert(0, (windows, config_pretrained(checkpoint.config, windows)))
    for windows, pretrained in sources:
        if windows is None or architecture.window_sizes not in (None, windows):
            continue
        architecture = replace(architecture, window_sizes=check_window_size(windows))
        if pretrained is not None:
            return architecture.with_pretraining(pretrained)
    return architecture


def with_chosen_windows(
    architecture: Architecture,
    window_size: Sequence[int] | None,
    pretrained_window_size: Sequence[int] | None,
) -> Architecture:
    """The architecture with the windows that the user gives.

    Raises:
        CheckpointError: If windows of pre-training are given for a Swin V1, or others than those
            that the checkpoint tells.
    """
    if pretrained_window_size is not None:
        pretrained = tuple(pretrained_window_size)
        if architecture.version == 1:
            raise CheckpointError(
                '--pretrained-window-size is for Swin V2; this is a Swin V1, whose bias tables '
                'tell their windows'
            )
        told = architecture.pretrained_window_sizes or architecture.window_sizes
        if architecture.pretraining_told and told != pretrained:
            raise CheckpointError(
                f'it tells that it was pre-trained with windows {told}; '
                f'--pretrained-window-size says {pretrained}'
            )
        architecture = architecture.with_pretraining(pretrained)
    return architecture if window_size is None else architecture.with_window(window_size)


def windows_note(architecture: Architecture) -> dict[str, str]:
    """What the note of a file says about windows; text, as safetensors takes nothing else."""
    if architecture.window_sizes is None:
        return {}
    note = {_WINDOWS: _text(architecture.window_sizes)}
    if architecture.version == 2 and architecture.pretraining_told:
        note[_PRETRAINED] = _text(scaling_windows(architecture))
    return note


def scaling_windows(architecture: Architecture) -> tuple[int, ...] | None:
    """Windows by which a Swin V2 scales offsets; None if they are not known, or it is a V1."""
    if architecture.version == 1 or not architecture.pretraining_told:
        return None
    return architecture.pretrained_window_sizes or architecture.window_sizes


def _text(sizes: Sequence[int]) -> str:
    return ','.join(map(str, sizes))


def _from_note(meta: Mapping[str, Any], key: str) -> tuple[int, ...] | None:
    """Windows in a note; None if there are none, or something else has this name."""
    parts = str(meta.get(key, ''))[:100].split(',')
    if not all(part.isascii() and part.isdigit() for part in parts):
        return None
    try:
        return check_window_size(tuple(map(int, parts)))
    except ValueError:
        return None
