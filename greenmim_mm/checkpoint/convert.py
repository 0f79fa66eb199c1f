"""Parameters of one format to another, with an account of every key."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ops import log_spaced_offsets
from .architecture import check_window_size
from .checks import check_shapes, check_whole
from .formats import detect_format, find_format
from .layout import Format, Layout
from .text import printable
from .transforms import (
    Entry,
    coords_windows,
    index_buffer,
    resize_bias_table,
    table_window,
)

_TABLE = 'relative_position_bias_table'
_INDEX = 'relative_position_index'
_COORDS = 'relative_coords_table'
_COMPUTED = 'computed, not learned'
_UNKNOWN = 'unknown name'
# transformers' has one position more than that of Microsoft's code.
_POSITION_KEY = 'embeddings.position_embeddings'
_POSITIONS = 'absolute position embedding of transformers, for which no format has a place'

# Why a canonical name may have no place, and whether that changes the network.
_NO_PLACE = (
    (re.compile(rf'.*\.({_INDEX}|{_COORDS})'), _COMPUTED, False),
    (re.compile(r'mask_token|neck\.decoder\..*'), 'SimMIM pre-training part', False),
    (re.compile(r'neck\..*'), 'pre-training decoder', False),
    (re.compile(r'head\..*'), 'classification head', False),
    (re.compile(r'norm[0-3]\..*'), 'norm of an output', False),
    (re.compile(r'absolute_pos_embed'), 'absolute position embedding', True),
    (re.compile(r'.*'), 'learned parameter', True),
)


@dataclass
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

    mapped: dict[str, str] = field(default_factory=dict)
    transformed: dict[str, tuple[str, str]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    source: str = ''
    target: str = ''
    version: int = 1
    left_out: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def unknown(self) -> list[str]:
        """Source keys that no table knows."""
        return [key for key, reason in self.dropped.items() if reason == _UNKNOWN]

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

    def drop(self, key: str, reason: str, lost: bool) -> None:
        """Note that a source key was dropped."""
        self.dropped[key] = reason
        if lost:
            self.lost.append(key)


def convert_state_dict(
    state_dict: Mapping[str, Tensor],
    source: str,
    target: str,
    window_size: int | Sequence[int] | None = None,
    pretrained_window_size: int | Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Rename and reorder the parameters of a Swin, V1 or V2.

    Args:
        state_dict: Parameters under the names of ``source``: at least a whole backbone.
        source: Format of ``state_dict``, a key of :data:`~greenmim_mm.checkpoint.FORMATS`;
            'auto' finds it out.
        target: Format to make.
        window_size: Window of the result, or one per stage; None keeps the source's. In Swin V1
            the bias tables are resized, in V2 only buffers depend on it. Give one per stage
            where the target's library shrinks the window of a stage whose map is smaller (timm
            and Microsoft's code; window 14 on images of 224 pixels becomes ``(14, 14, 14, 7)``).
        pretrained_window_size: Swin V2: windows of pre-training, one for all stages or one for
            each. They scale the offsets in the attention; None takes them from the source's
            buffers, **or for those in use where it has none**.

    Returns:
        Parameters under the names of ``target``; values share memory where unchanged.

    Raises:
        ValueError: If a format is unknown or has no such version of Swin, parts of the Swin are
            lacking, a value has a shape that does not fit the others, or ``window_size`` is none.
    """
    return convert_with_report(state_dict, source, target, window_size, pretrained_window_size)[0]


def convert_with_report(
    state_dict: Mapping[str, Tensor],
    source: str,
    target: str,
    window_size: int | Sequence[int] | None = None,
    pretrained_window_size: int | Sequence[int] | None = None,
) -> tuple[dict[str, Tensor], ConversionReport]:
    """As :func:`convert_state_dict`, with an account of every key."""
    source = detect_format(list(state_dict)) if source == 'auto' else source
    source_format, target_format = find_format(source), find_format(target)
    windows = None if window_size is None else check_window_size(window_size)
    pretrained = pretrained_window_size
    if pretrained is not None:
        pretrained = check_window_size(pretrained, name='pretrained_window_size')
    report = ConversionReport(source=source, target=target)
    entries, old = _read(state_dict, source_format, report)
    report.version = old.version
    new = target_format.target_layout(entries, old.version)
    # What both have in common is left alone.
    for transform in old.transforms:
        if transform not in new.transforms:
            entries = transform.reading(entries)
    entries = _fit_windows(entries, new, windows, pretrained, report)
    for transform in new.transforms:
        if transform not in old.transforms:
            entries = transform.writing(entries)
    result = _write(entries, new, report)
    _note_missing(entries, new, report)
    return result, report


def canonical_state_dict(
    state_dict: Mapping[str, Tensor], source: str = 'auto'
) -> dict[str, Tensor]:
    """The parameters under GreenSwin's own names, without ``backbone.``.

    Args:
        state_dict: As for :func:`convert_state_dict`.
        source: Its format; 'auto' finds it out.

    Returns:
        Backbone, head (``head.fc.``) and pre-training parts (``neck.``, ``mask_token``) as far as
        ``state_dict`` has them. Buffers are not added.

    Raises:
        ValueError: As :func:`convert_state_dict`.
    """
    source = detect_format(list(state_dict)) if source == 'auto' else source
    entries, layout = _read(state_dict, find_format(source), ConversionReport())
    for transform in layout.transforms:
        entries = transform.reading(entries)
    values = {name: entry.value for name, entry in entries.items()}
    if layout.flat_index:
        for name, value in values.items():
            if name.endswith(_INDEX):
                values[name] = value.reshape(round(value.numel() ** 0.5), -1)
    return values


def _read(
    state_dict: Mapping[str, Tensor], source: Format, report: ConversionReport
) -> tuple[dict[str, Entry], Layout]:
    """Values by canonical name, not yet transformed, and the layout that they were read by."""
    layout = source.source_layout(state_dict)
    entries: dict[str, Entry] = {}
    for key, value in state_dict.items():
        if (name := layout.to_canonical(key)) is not None:
            entries[name] = Entry(value, (key,))
        elif source.ignores(key):
            report.drop(key, _COMPUTED, lost=False)
        elif layout.is_beside(key):
            report.drop(key, f'beside the backbone ({key.split(".")[0]})', lost=False)
        else:
            report.drop(key, _POSITIONS if key.endswith(_POSITION_KEY) else _UNKNOWN, lost=True)
    if not entries:
        raise ValueError(
            f'this is another architecture: 0 of {len(state_dict)} keys fit the format '
            f'{source.name}; first keys: {list(state_dict)[:3]}'
        )
    check_whole(entries, len(state_dict), source, layout)
    check_shapes(entries, layout.version)
    return entries, layout


def _fit_windows(
    entries: Mapping[str, Entry],
    layout: Layout,
    windows: tuple[int, ...] | None,
    pretraining: tuple[int, ...] | None,
    report: ConversionReport,
) -> dict[str, Entry]:
    """Resize bias tables and make the buffers that the target's models keep in a state dict."""
    result = dict(entries)
    for name in entries:
        if not name.endswith('.attn.w_msa.proj.weight'):
            continue
        stem = name.removesuffix('proj.weight')
        old, told = _block_window(entries, stem)
        stage = int(stem.split('.')[1])
        new = windows[stage] if windows else old
        pretrained = pretraining[stage] if pretraining else told
        table = entries.get(stem + _TABLE)
        if table is not None and new != old:
            result[stem + _TABLE] = table.changed(
                resize_bias_table(table.value, (2 * new - 1) ** 2), f'window {old} to {new} resized'
            )
        for end in (_INDEX, _COORDS):
            target = layout.from_canonical(stem + end)
            if target is None:
                continue
            if new is None:
                report.missing[target] = 'buffer of the window, which Swin V2 does not tell'
                continue
            value, why = _buffer(end, new, pretrained, layout)
            known = entries.get(stem + end)
            if known is None:
                result[stem + end] = Entry(value, ())
                report.added[target] = why
            elif end == _COORDS and (new, pretrained) == (old, told) and _is_exact(known.value):
                continue
            elif (end == _COORDS and not _is_exact(known.value)) or not _same(known.value, value):
                result[stem + end] = known.changed(value, why)
    return result


def _buffer(
    end: str, window_size: int, pretrained: int | None, layout: Layout
) -> tuple[Tensor, str]:
    why = f'buffer of window {window_size}'
    if end == _INDEX:
        return index_buffer(window_size, layout.flat_index), why
    if pretrained is None:
        why += ', which pre-training is taken to have had, too'
    elif pretrained != window_size:
        why += f', pre-trained with {pretrained}'
    return log_spaced_offsets(window_size, pretrained or window_size), why


def _is_exact(coords: Tensor) -> bool:
    """Whether offsets have not been rounded, as those in files of half precision are."""
    return coords.dtype == torch.float32


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and bool((first == second.to(first.device)).all())


def _block_window(entries: Mapping[str, Entry], stem: str) -> tuple[int | None, int | None]:
    """Window of a block, and of its pre-training (Swin V2), as far as its values tell them."""
    if (table := entries.get(stem + _TABLE)) is not None:
        return table_window(table.value), None
    try:
        if (coords := entries.get(stem + _COORDS)) is not None:
            return coords_windows(coords.value)
    except ValueError as error:
        raise ValueError(f'{coords.sources[0]}: {error}') from error
    if (index := entries.get(stem + _INDEX)) is not None:
        window = round(index.value.numel() ** 0.25)
        if window**4 != index.value.numel():
            raise ValueError(
                f'{index.sources[0]} has shape {tuple(index.value.shape)}; an index buffer has '
                'window_size ** 4 entries'
            )
        return window, None
    return None, None


def _write(
    entries: Mapping[str, Entry], layout: Layout, report: ConversionReport
) -> dict[str, Tensor]:
    """Values under the target's names."""
    result: dict[str, Tensor] = {}
    targets: dict[str, list[str]] = {}
    steps: dict[str, tuple[str, ...]] = {}
    for name, entry in entries.items():
        target = layout.from_canonical(name)
        if target is None:
            for key in entry.sources:
                report.drop(key, *_no_place(name, report.target))
            continue
        result[target] = entry.value
        for key in entry.sources:
            targets.setdefault(key, []).append(target)
            steps[key] = entry.how
    for key, names in targets.items():
        if steps[key]:
            report.transformed[key] = (', '.join(names), '; '.join(steps[key]))
        else:
            report.mapped[key] = names[0]
    return result


def _no_place(name: str, target: str) -> tuple[str, bool]:
    part, lost = next((text, lost) for pattern, text, lost in _NO_PLACE if pattern.fullmatch(name))
    return (part if part == _COMPUTED else f'{part} has no place in {target}'), lost


def _note_missing(entries: Mapping[str, Entry], layout: Layout, report: ConversionReport) -> None:
    for template in layout.model_has:
        for leaf in ('weight', 'bias'):
            name = template.format(p=leaf)
            if name not in entries:
                part = next(text for pattern, text, _ in _NO_PLACE if pattern.fullmatch(name))
                report.missing[layout.from_canonical(name)] = (
                    f'{part} is not in the source; a model keeps its initial values'
                )
