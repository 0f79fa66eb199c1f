"""Read: a checkpoint file becomes one network under canonical names."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from .architecture import Architecture, check_window_size, infer_architecture
from .formats import AUTO, detect_format, find_format
from .huggingface import config_pretrained, config_windows
from .naming import Layout
from .notes import windows_in_note
from .reading import Checkpoint, CheckpointError, load_checkpoint
from .transforms import INDEX, Entry

COMPUTED, UNKNOWN = 'computed, not learned', 'unknown name'
# transformers' has one position more than that of Microsoft's code.
_POSITION_KEY = 'embeddings.position_embeddings'
_POSITIONS = 'absolute position embedding of transformers, for which no format has a place'


@dataclass(frozen=True)
class Network:
    """The Swin of one checkpoint; resizing makes another of it, spelling and verifying use it.

    Attributes:
        entries: Values by canonical name, each with the keys that it was made of: the backbone,
            head (``head.fc.``) and pre-training parts (``neck.``, ``mask_token``).
        architecture: Its sizes, with its windows and those of its pre-training as far as values,
            ``config.json`` or note tell them.
        source: Name of the format that it was read by.
        dropped: ``{key: reason}`` of keys of the source without a canonical name.
        lost: Those of ``dropped`` that no table knows and that may be learned.
        checkpoint: What was read.
    """

    entries: Mapping[str, Entry]
    architecture: Architecture
    source: str
    dropped: Mapping[str, str]
    lost: tuple[str, ...]
    checkpoint: Checkpoint

    @cached_property
    def state_dict(self) -> dict[str, Tensor]:
        """Values by canonical name."""
        return {name: entry.value for name, entry in self.entries.items()}


def read_network(
    path: str | Path, source: str = AUTO, trust: bool = False, key: str | None = None
) -> Network:
    """Read the Swin of a checkpoint.

    Args:
        path: ``.safetensors``, a file of ``torch.save``, or a folder of Hugging Face's.
        source: Its format, a key of :data:`~greenmim_mm.checkpoint.FORMATS`; 'auto' finds it out.
        trust: Read a file that could run code, and let it.
        key: Under which the file keeps the parameters; None finds it.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is damaged, no Swin, or a part or a wrong shape spoils it; the
            message names the file and the key.
    """
    checkpoint = load_checkpoint(path, trust, mmap=True, key=key)
    try:
        network = network_of(checkpoint, source)
        _check_numbers(checkpoint.state_dict)
    except ValueError as error:
        raise CheckpointError(f'{path}: {error}{_hint(checkpoint)}') from error
    return network


def network_of(checkpoint: Checkpoint | Mapping[str, Tensor], source: str = AUTO) -> Network:
    """The Swin of a checkpoint, or of parameters alone.

    Args:
        checkpoint: Parameters under the names of ``source``: at least a whole backbone.
        source: Their format; 'auto' finds it out.

    Raises:
        ValueError: If the format is unknown, parts of the Swin are lacking, or a value has a
            shape or type that does not fit; the message names it.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint(Path(), dict(checkpoint))
    state_dict = checkpoint.state_dict
    found = find_format(detect_format(state_dict.keys()) if source == AUTO else source)
    layout = found.source_layout(state_dict)
    entries: dict[str, Entry] = {}
    dropped: dict[str, str] = {}
    lost: list[str] = []
    for key, value in state_dict.items():
        if (name := layout.to_canonical(key)) is not None:
            _check_type(name, key, value)
            entries[name] = Entry(value, {key: value})
        elif found.ignores(key):
            dropped[key] = COMPUTED
        elif layout.is_beside(key):
            dropped[key] = f'beside the backbone ({key.split(".")[0]})'
        else:
            dropped[key] = _POSITIONS if key.endswith(_POSITION_KEY) else UNKNOWN
            lost.append(key)
    for key in checkpoint.skipped:
        dropped[key] = 'not a tensor with a name'
        if found.to_canonical(key) is not None:
            lost.append(key)
    architecture = _architecture(entries, layout, checkpoint, found.name)
    for transform in layout.transforms:
        entries = transform.reading(entries)
    return Network(entries, architecture, found.name, dropped, tuple(lost), checkpoint)


def _architecture(
    entries: Mapping[str, Entry], layout: Layout, checkpoint: Checkpoint, source: str
) -> Architecture:
    """The sizes of a network whose values have yet to be transformed."""
    if not any('.blocks.' in name for name in entries):
        raise ValueError(
            f'this is another architecture: {len(entries)} of {len(checkpoint.state_dict)} keys '
            f'fit the format {source}; first keys: {list(checkpoint.state_dict)[:3]}'
        )
    values = {name: entry.value for name, entry in entries.items()}
    found = infer_architecture(values, layout.from_canonical, layout.transforms)
    return _with_told_windows(found, checkpoint)


def _with_told_windows(architecture: Architecture, checkpoint: Checkpoint) -> Architecture:
    """The architecture with the windows that ``config.json`` or the note of a checkpoint tell."""
    if architecture.scale_is_known:
        return architecture
    sources = [windows_in_note(checkpoint.meta)]
    if checkpoint.config is not None:
        windows = config_windows(checkpoint.config, architecture.version)
        sources.insert(0, (windows, config_pretrained(checkpoint.config, windows)))
    for windows, pretrained in sources:
        if windows is None or architecture.window_sizes not in (None, windows):
            continue
        architecture = architecture.with_window(windows)
        if pretrained is not None:
            pretrained = check_window_size(pretrained, name='pretrained_window_size')
            return replace(architecture, pretrained_window_sizes=pretrained)
    return architecture


def _check_type(name: str, key: str, value: Tensor) -> None:
    """Refuse learned parameters that are no plain floating-point numbers."""
    if name.endswith(INDEX):
        return
    if value.layout != torch.strided:
        raise CheckpointError(f'{key} is a sparse tensor; learned parameters are dense')
    if not value.is_floating_point():
        kind = str(value.dtype).removeprefix('torch.')
        raise CheckpointError(
            f'{key} has numbers of type {kind}; learned parameters are floating-point numbers'
        )


def _check_numbers(keys: Collection[str]) -> None:
    """Refuse names that number a layer beyond the count of keys."""
    for key in keys:
        for number in re.findall(r'(?<![^.])\d+(?![^.])', key):
            if len(number) > 9 or int(number) > len(keys):
                raise CheckpointError(
                    f'{key[:200]} is no layer of a network with {len(keys)} tensors'
                )


def _hint(checkpoint: Checkpoint) -> str:
    if not checkpoint.skipped:
        return ''
    return (
        f' ({len(checkpoint.skipped)} entries are no tensors with a name, such as numpy arrays, '
        f'e.g. {checkpoint.skipped[0]})'
    )
