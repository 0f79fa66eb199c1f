"""Spell: a network becomes parameters under the names of a format, with an account of every key."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import coords_windows, log_spaced_offsets, relative_position_index
from ..text import printable
from .architecture import check_finite
from .formats import find_format
from .layouts import BUFFERS, COORDS, INDEX, Entry, Layout
from .network import COMPUTED, UNKNOWN, Network, stage_of
from .reading import CheckpointError

DTYPES = {'fp16': torch.float16, 'bf16': torch.bfloat16, 'fp32': torch.float32}

# What a canonical name may have no place for, and whether that makes another network.
_PARTS = (
    (re.compile(rf'.*\.({"|".join(BUFFERS)})'), COMPUTED, False),
    (re.compile(r'mask_token|neck\.decoder\..*'), 'SimMIM pre-training part', False),
    (re.compile(r'neck\..*'), 'pre-training decoder', False),
    (re.compile(r'head\..*'), 'classification head', False),
    (re.compile(r'norm[0-3]\..*'), 'norm of an output', False),
    (re.compile(r'absolute_pos_embed'), 'absolute position embedding', True),
    (re.compile(r'.*'), 'learned parameter', True),
)


@dataclass(frozen=True)
class ConversionReport:
    """What became of each key.

    Attributes:
        mapped: ``{source key: target key}`` of unchanged values.
        transformed: ``{source key: (target key, how)}``; several target keys are joined by ', '.
        dropped: ``{source key: reason}``.
        added: ``{target key: reason}`` of values that were computed.
        missing: ``{target key: reason}`` of what a model of the target has and the source has
            not: norms of outputs and heads, which keep their initial values.
        lost: Those of ``dropped`` that should not have been: names that no table knows, and
            learned parameters of the backbone without which the network is another.
        source: Format of the source.
        target: Format of the result.
        version: Version of Swin.
        left_out: What a file holds beside the parameters, e.g. 'optimizer'.
        notes: What else is to be known, e.g. what was assumed.
    """

    mapped: dict[str, str]
    transformed: dict[str, tuple[str, str]]
    dropped: dict[str, str]
    added: dict[str, str]
    missing: dict[str, str]
    lost: list[str]
    source: str
    target: str
    version: int
    left_out: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def unknown(self) -> list[str]:
        """Source keys that no table knows."""
        return [key for key, reason in self.dropped.items() if reason == UNKNOWN]

    @property
    def lossless(self) -> bool:
        """Whether the backbone of the target is the network of the source.

        Decoders, heads, norms of outputs and other parts of a detector may have been dropped
        where the target has no place for them.
        """
        return not self.lost

    def summary(self) -> str:
        """The account in a few lines; keys of one kind are counted together."""
        lines = [
            f'kept {len(self.mapped) + len(self.transformed)} parameters, '
            f'{len(self.transformed)} of them transformed ({self.source} to {self.target})'
        ]
        for verb, entries in (
            ('transformed', {key: how for key, (_, how) in self.transformed.items()}),
            ('dropped', self.dropped),
            ('added', self.added),
            ('missing', self.missing),
        ):
            reasons: dict[str, list[str]] = {}
            for key, reason in entries.items():
                reasons.setdefault(reason, []).append(key)
            for reason, keys in reasons.items():
                lines.append(
                    f'{verb} {len(keys)} ({printable(reason)}): {printable(keys[0])}'
                    + ', ...' * (len(keys) > 1)
                )
        if self.lost:
            lines.append(
                f'LOST {len(self.lost)}: {", ".join(map(printable, self.lost[:3]))}'
                + ', ...' * (len(self.lost) > 3)
            )
        if self.left_out:
            lines.append(f'left out of the file: {", ".join(self.left_out)}')
        lines += [f'note: {note}' for note in self.notes]
        return '\n'.join(printable(line, 1000) for line in lines)


class Spelling(NamedTuple):
    """Parameters under the names of a format, and what became of each key of the source.

    Values share memory with the network's where unchanged.
    """

    state_dict: dict[str, Tensor]
    report: ConversionReport


def spell(network: Network, target: str) -> Spelling:
    """The parameters of a network under the names of a format.

    Raises:
        ValueError: If the format is unknown or has no such version of Swin.
    """
    layout = find_format(target).target_layout(network.entries, network.architecture.version)
    entries = {**network.entries, **dict(_new_buffers(network, layout))}
    for transform in layout.transforms:
        entries = transform.writing(entries)
    state_dict: dict[str, Tensor] = {}
    names: dict[str, list[str]] = {}
    steps: dict[str, tuple[str, ...]] = {}
    dropped, lost = dict(network.dropped), list(network.lost)
    added: dict[str, str] = {}
    for name, entry in entries.items():
        key = layout.from_canonical(name)
        if key is None:
            part, is_lost = _part(name)
            reason = part if part == COMPUTED else f'{part} has no place in {target}'
            dropped.update(dict.fromkeys(entry.sources, reason))
            lost += entry.sources if is_lost else ()
            continue
        state_dict[key] = entry.value
        if not entry.sources:
            added[key] = entry.how[0]
        for source in entry.sources:
            names.setdefault(source, []).append(key)
            steps[source] = entry.how
    report = ConversionReport(
        mapped={source: keys[0] for source, keys in names.items() if not steps[source]},
        transformed={
            source: (', '.join(keys), '; '.join(steps[source]))
            for source, keys in names.items()
            if steps[source]
        },
        dropped=dropped,
        added=added,
        missing=_missing(entries, layout, network),
        lost=lost,
        source=network.source,
        target=target,
        version=network.architecture.version,
        left_out=network.checkpoint.left_out,
        notes=_notes(network),
    )
    return Spelling(state_dict, report)


def check_kept(network: Network, report: ConversionReport) -> None:
    """Raise ``CheckpointError`` if a value of the source that was kept is not a number."""
    kept = report.mapped.keys() | report.transformed.keys()
    check_finite({k: v for k, v in network.checkpoint.state_dict.items() if k in kept})


def cast(state_dict: Mapping[str, Tensor], dtype: str | None) -> dict[str, Tensor]:
    """Parameters in another type: 'fp16', 'bf16' or 'fp32'; None keeps theirs.

    Raises:
        CheckpointError: If a number is too large for the type.
    """
    if dtype is None:
        return dict(state_dict)
    # Offsets are no weights: rounded, they would shift every bias of a Swin V2.
    result = {
        key: value.to(DTYPES[dtype])
        if value.is_floating_point() and not key.endswith(COORDS)
        else value
        for key, value in state_dict.items()
    }
    try:
        check_finite(result)
    except CheckpointError as error:
        raise CheckpointError(f'it does not fit into {dtype}: {error}') from error
    return result


def _buffers_of(network: Network, layout: Layout) -> Iterator[tuple[str, str]]:
    """Canonical name and leaf of each buffer that models of the target keep in a state dict."""
    for name in network.entries:
        if name.endswith('.attn.w_msa.proj.weight'):
            for leaf in (INDEX, COORDS):
                buffer = name.removesuffix('proj.weight') + leaf
                if layout.from_canonical(buffer) is not None:
                    yield buffer, leaf


def _new_buffers(network: Network, layout: Layout) -> Iterator[tuple[str, Entry]]:
    """Buffers that the network has not, or not right, as far as its windows are known.

    Those of the file are kept where they are right, to the last bit. New ones have no source.
    """
    windows = network.architecture.window_sizes
    if windows is None:
        return
    scales = network.architecture.pretrained_window_sizes or (None,) * len(windows)
    for name, leaf in _buffers_of(network, layout):
        window, scale = windows[stage_of(name)], scales[stage_of(name)]
        known = network.entries.get(name)
        if known is not None and _is_right(known.value, leaf, window, scale):
            continue
        value, how = _buffer(leaf, window, scale)
        yield name, Entry(value, {}, (how,)) if known is None else known.changed(value, how)


def _is_right(value: Tensor, leaf: str, window: int, scale: int | None) -> bool:
    """Whether a buffer of a file is that of the windows."""
    if leaf == INDEX:
        right = relative_position_index(window)
        return value.shape == right.shape and bool((value == right).all())
    # In files of half precision offsets have been rounded.
    return value.dtype == torch.float32 and coords_windows(value) == (window, scale)


def _buffer(leaf: str, window: int, scale: int | None) -> tuple[Tensor, str]:
    how = f'buffer of window {window}'
    if leaf == INDEX:
        return relative_position_index(window), how
    if scale is None:
        how += ', which pre-training is taken to have had, too'
    elif scale != window:
        how += f', pre-trained with {scale}'
    return log_spaced_offsets(window, scale or window), how


def _part(name: str) -> tuple[str, bool]:
    """What has this canonical name, and whether the network is another one without it."""
    return next((text, lost) for pattern, text, lost in _PARTS if pattern.fullmatch(name))


def _missing(entries: Mapping[str, Entry], layout: Layout, network: Network) -> dict[str, str]:
    """What a model of the target has beyond the entries."""
    missing = {}
    if network.architecture.window_sizes is None:
        for name, _ in _buffers_of(network, layout):
            why = 'buffer of the window, which Swin V2 does not tell'
            missing[layout.from_canonical(name)] = why
    for template in layout.model_has:
        for leaf in ('weight', 'bias'):
            name = template.format(p=leaf)
            if name not in entries:
                why = f'{_part(name)[0]} is not in the source; a model keeps its initial values'
                missing[layout.from_canonical(name)] = why
    return missing


def _notes(network: Network) -> list[str]:
    """What else is to be known of a conversion."""
    notes = []
    if 'ema_state_dict' in network.checkpoint.left_out:
        notes.append('the file has averaged weights, too; --key ema_state_dict takes them')
    windows = network.architecture.window_sizes
    if not network.architecture.scale_is_known:
        notes.append(
            'the source does not tell the windows of this Swin V2, and the result does not either'
            if windows is None
            else 'the source does not tell the windows of its pre-training, by which Swin V2 '
            f'scales offsets; they are taken to be those in use, {windows}'
        )
    return notes
