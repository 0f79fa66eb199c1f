"""Read and resize: a checkpoint file becomes one network under canonical names, and another."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ops import resize_bias_table, table_window
from ..version import __version__
from .architecture import Architecture, check_window_size, infer_architecture
from .formats import AUTO, FORMATS, detect_format, find_format
from .huggingface import windows_in_config
from .layouts import INDEX, TABLE, Entry, Layout
from .notes import sha256
from .reading import Checkpoint, CheckpointError, load_checkpoint

COMPUTED, UNKNOWN = 'computed, not learned', 'unknown name'
# transformers' has one position more than that of Microsoft's code.
_POSITION_KEY = 'embeddings.position_embeddings'
_POSITIONS = 'absolute position embedding of transformers, for which no format has a place'
# Told in notes under the names that an architecture has for them.
_WINDOWS = ('window_sizes', 'pretrained_window_sizes')


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

    @property
    def licence(self) -> str | None:
        """Licence note of the checkpoint: its own, or the one that its format implies."""
        return self.checkpoint.meta.get('licence') or FORMATS[self.source].licence

    def note(self, target: str) -> dict[str, str]:
        """What a file of the format ``target`` with this network says about itself.

        Where values do not tell the windows, it does: those of a Swin V2 are the same for every
        window, but scaled by that of pre-training.
        """
        note = dict(
            source_file=self.checkpoint.path.name,
            source_sha256=sha256(self.checkpoint.weights_file),
            source_format=self.source,
            format=target,
            greenmim_mm_version=__version__,
        )
        if self.licence:
            note['licence'] = self.licence
        for name in _WINDOWS:
            if (sizes := getattr(self.architecture, name)) is None:
                break
            # Text, as safetensors takes nothing else.
            note[name] = ','.join(map(str, sizes))
        return note


def read_network(
    path: str | Path, source: str = AUTO, trust: bool = False, key: str | None = None
) -> Network:
    """Read the Swin of a checkpoint.

    Args:
        path: ``.safetensors``, a file of ``torch.save``, or a folder of Hugging Face's.
        source: Its format, a key of :data:`~greenmim_mm.checkpoint.FORMATS`; 'auto' finds it out
            by the names.
        trust: Read a file that could run code, and let it.
        key: Under which the file keeps the parameters, e.g. 'ema_state_dict'; None finds it.

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
    """The Swin of a checkpoint, or of parameters alone: at least a whole backbone.

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


def resize(
    network: Network,
    window_size: int | Sequence[int] | None = None,
    pretrained_window_size: int | Sequence[int] | None = None,
) -> Network:
    """Give a network other windows, and tell what its file does not.

    In Swin V1 bias tables are resized. The learned parameters of Swin V2 are the same for every
    window; it remembers those of its pre-training.

    Args:
        network: The network.
        window_size: Its windows then, one for all stages or one for each; None keeps them. Give
            one for each where a library shrinks the window of a stage whose map is smaller (timm
            and Microsoft's code; window 14 on images of 224 pixels becomes ``(14, 14, 14, 7)``).
        pretrained_window_size: Swin V2: windows of the pre-training, by which offsets are scaled,
            if nothing tells them; one for all stages or one for each.

    Raises:
        ValueError: If a size makes no sense, or windows of pre-training are given for a Swin V1
            or others than those that are told.
    """
    architecture = network.architecture
    if pretrained_window_size is not None:
        architecture = _with_pretraining(architecture, pretrained_window_size)
    if window_size is not None:
        architecture = architecture.with_window(window_size)
    entries = dict(network.entries)
    for name, entry in entries.items():
        if not name.endswith(TABLE):
            continue
        old, new = table_window(entry.value), architecture.window_sizes[stage_of(name)]
        if new != old:
            table = resize_bias_table(entry.value, (2 * new - 1) ** 2)
            entries[name] = entry.changed(table, f'window {old} to {new} resized')
    return replace(network, entries=entries, architecture=architecture)


def stage_of(name: str) -> int:
    """Stage that a canonical name lies in."""
    return int(name.split('.')[1])


def _with_pretraining(architecture: Architecture, sizes: int | Sequence[int]) -> Architecture:
    sizes = check_window_size(sizes, 'pretrained_window_size')
    if architecture.version == 1:
        raise CheckpointError(
            '--pretrained-window-size is for Swin V2; this is a Swin V1, whose bias tables tell '
            'their windows'
        )
    if architecture.pretrained_window_sizes not in (None, sizes):
        raise CheckpointError(
            f'it tells that it was pre-trained with windows {architecture.pretrained_window_sizes}'
            f'; --pretrained-window-size says {sizes}'
        )
    return replace(architecture, pretrained_window_sizes=sizes)


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
    sources = [tuple(_windows_in_note(checkpoint.meta.get(name)) for name in _WINDOWS)]
    if checkpoint.config is not None:
        sources.insert(0, windows_in_config(checkpoint.config, architecture.version))
    for windows, pretrained in sources:
        if windows is None or architecture.window_sizes not in (None, windows):
            continue
        architecture = architecture.with_window(windows)
        if pretrained is not None:
            pretrained = check_window_size(pretrained, name='pretrained_window_size')
            return replace(architecture, pretrained_window_sizes=pretrained)
    return architecture


def _windows_in_note(text: Any) -> tuple[int, ...] | None:
    """Windows that a note tells; None if there are none, or something else has this name."""
    parts = str(text)[:100].split(',')
    if not all(part.isascii() and part.isdigit() for part in parts):
        return None
    try:
        return check_window_size(tuple(map(int, parts)))
    except ValueError:
        return None


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
