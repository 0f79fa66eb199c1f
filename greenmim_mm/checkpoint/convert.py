"""One format to another, state dicts and files, with an account of every key."""

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import relative_position_index
from ..version import __version__
from .files import (
    CheckpointError,
    check_destination,
    find_state_dict,
    parameters_key,
    read_checkpoint,
    write_checkpoint,
)
from .formats import FORMATS, Format, detect_format

# Some of what every block has. Swin V2 has no bias table.
_BLOCK_LEAVES = (
    'norm1.weight',
    'attn.w_msa.relative_position_bias_table',
    'attn.w_msa.qkv.weight',
    'attn.w_msa.proj.weight',
    'norm2.weight',
    'ffn.layers.0.0.weight',
    'ffn.layers.1.weight',
)


@dataclass
class ConversionReport:
    """What became of each key.

    Attributes:
        mapped: ``{source key: target key}`` of unchanged values.
        transformed: ``{source key: (target key, how)}``.
        dropped: ``{source key: reason}``.
        added: ``{target key: reason}`` of values that were computed.
        source: Format of the source.
        target: Format of the result.
        left_out: What a file holds beside the parameters, e.g. 'optimizer'.
    """

    mapped: dict[str, str] = field(default_factory=dict)
    transformed: dict[str, tuple[str, str]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    source: str = ''
    target: str = ''
    left_out: tuple[str, ...] = ()

    @property
    def unknown(self) -> list[str]:
        """Source keys that no table knows."""
        return [key for key, reason in self.dropped.items() if reason == 'unknown name']

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
        ):
            reasons: dict[str, list[str]] = {}
            for key, reason in entries.items():
                reasons.setdefault(reason, []).append(key)
            for reason, keys in reasons.items():
                lines.append(
                    f'{verb} {len(keys)} ({reason}): {keys[0]}' + ', ...' * (len(keys) > 1)
                )
        if self.left_out:
            lines.append(f'left out of the file: {", ".join(self.left_out)}')
        return '\n'.join(lines)


def convert_state_dict(
    state_dict: Mapping[str, Tensor], source: str, target: str
) -> dict[str, Tensor]:
    """Rename and reorder the parameters of a Swin.

    Args:
        state_dict: Parameters under the names of ``source``.
        source: Format of ``state_dict``, a key of :data:`~greenmim_mm.checkpoint.FORMATS`.
        target: Format to make.

    Returns:
        Parameters under the names of ``target``; values share memory where unchanged.

    Raises:
        ValueError: If a format is unknown, no key fits ``source``, or a value has a shape that
            no Swin has.
    """
    return convert_with_report(state_dict, source, target)[0]


def convert_with_report(
    state_dict: Mapping[str, Tensor], source: str, target: str
) -> tuple[dict[str, Tensor], ConversionReport]:
    """As :func:`convert_state_dict`, with an account of every key."""
    source_format, target_format = _format(source), _format(target)
    report = ConversionReport(source=source, target=target)
    result: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        canonical = source_format.to_canonical(key)
        if canonical is None:
            ignored = source_format.ignores(key)
            report.dropped[key] = 'computed, not learned' if ignored else 'unknown name'
            continue
        name = target_format.from_canonical(canonical)
        if name is None:
            part = 'pre-training decoder' if canonical.startswith('neck.') else canonical
            report.dropped[key] = f'{part} has no place in {target}'
            continue
        reordered = '.downsample.' in canonical and (
            source_format.merge_order != target_format.merge_order
        )
        if reordered:
            if value.ndim == 0 or value.shape[-1] % 4:
                raise ValueError(
                    f'{key} has shape {tuple(value.shape)}; patch merging has 4 * C channels on '
                    'the last axis'
                )
            value = _reorder_merging(value, target_format.merge_order)
            report.transformed[key] = (name, 'channel order of patch merging')
        else:
            report.mapped[key] = name
        result[name] = value
    if not result:
        raise ValueError(
            f'none of the {len(state_dict)} keys fits the format {source}; first keys: '
            f'{list(state_dict)[:3]}'
        )
    _add_index_buffers(result, report)
    return result, report


def convert_file(
    src: str | Path, dst: str | Path, target: str, source: str = 'auto', force: bool = False
) -> ConversionReport:
    """Convert the Swin of a checkpoint file and write it with a note of where it is from.

    Training state (optimizer, schedules, logs) is left out. The result is ``dict(meta=...,
    state_dict=...)``; ``meta`` has ``source_file`` (name), ``source_sha256``, ``source_format``,
    ``format``, ``greenmim_mm_version`` and, where the source's format has one, ``licence``.

    Args:
        src: Checkpoint of mmengine's runner, or the authors' file.
        dst: File to write.
        target: Format to make, a key of :data:`~greenmim_mm.checkpoint.FORMATS`.
        source: Format of ``src``; 'auto' finds it out by the names.
        force: Replace ``dst`` if it exists.

    Returns:
        The account of every key.

    Raises:
        FileNotFoundError: If ``src`` or the folder of ``dst`` does not exist.
        FileExistsError: If ``dst`` exists and ``force`` is not given, or it is ``src``.
        CheckpointError: If ``src`` is damaged or holds another architecture; it says how many
            keys fit.
        ValueError: If a format is unknown.
    """
    src, dst = Path(src), Path(dst)
    # An unknown target is better reported before a large file is read.
    wrapper = _format(target).wrapper
    check_destination(dst, force)
    checkpoint = read_checkpoint(src)
    if dst.exists() and dst.samefile(src):
        raise FileExistsError(f'{dst} is the source itself; write to another file')
    state_dict = find_state_dict(checkpoint, src)
    try:
        source = detect_format(list(state_dict)) if source == 'auto' else _format(source).name
        _check_keys(state_dict, _format(source))
        converted, report = convert_with_report(state_dict, source, target)
    except ValueError as error:
        raise CheckpointError(f'{src}: {error}') from error
    report.left_out = tuple(
        str(key)
        for key, value in checkpoint.items()
        if key != parameters_key(checkpoint) and not isinstance(value, Tensor)
    )
    meta = dict(
        source_file=src.name,
        source_sha256=_sha256(src),
        source_format=source,
        format=target,
        greenmim_mm_version=__version__,
    )
    if licence := FORMATS[source].licence:
        meta['licence'] = licence
    write_checkpoint({'meta': meta, wrapper: converted}, dst, force)
    return report


def resize_bias_table(table: Tensor, length: int) -> Tensor:
    """Resize a relative position bias table to another window, bicubically as mmdet does.

    Args:
        table: ``((2 * w - 1) ** 2, heads)``.
        length: Rows of the result, an odd square.

    Returns:
        ``(length, heads)`` in the dtype of ``table``.

    Raises:
        ValueError: If either length is not the square of an odd number.
    """
    old, new = _table_side(table), _table_side(table.new_empty(length, 0))
    image = table.float().t().reshape(1, -1, old, old)
    image = F.interpolate(image, size=(new, new), mode='bicubic', align_corners=False)
    return image.reshape(-1, length).t().contiguous().to(table.dtype)


def _table_side(table: Tensor) -> int:
    """Offsets ``2 * w - 1`` along one side of the window that a bias table covers."""
    side = round(table.shape[0] ** 0.5) if table.ndim == 2 else 0
    if side % 2 == 0 or side**2 != table.shape[0]:
        raise ValueError(
            'a relative position bias table has shape ((2 * window_size - 1) ** 2, heads), '
            f'not {tuple(table.shape)}'
        )
    return side


def _check_keys(keys: Collection[str], source: Format) -> None:
    """Raise ``ValueError`` unless the keys are those of a whole Swin and little else."""
    canonical = [source.to_canonical(key) for key in keys]
    known = {key for key in canonical if key is not None}
    fit = f'{len(known)} of {len(canonical)} keys fit the format {source.name}'
    if len(known) * 2 <= len(canonical):
        raise ValueError(f'this is another architecture: {fit}; first keys: {list(keys)[:3]}')
    if lacking := _lacking(known):
        raise ValueError(
            f'this is no whole Swin: {fit}, but {len(lacking)} are lacking, e.g. {lacking[0]}'
        )


def _lacking(keys: set[str]) -> list[str]:
    """Canonical names that a Swin with these keys must have besides."""
    blocks: list[set[int]] = [set() for _ in range(4)]
    for key in keys:
        if match := re.match(r'stages\.([0-3])\.blocks\.(\d+)\.', key):
            blocks[int(match[1])].add(int(match[2]))
    names = ['patch_embed.projection.weight']
    names += [
        f'stages.{stage}.blocks.{block}.{leaf}'
        for stage, numbers in enumerate(blocks)
        for block in range(max(len(numbers), 1))
        for leaf in _BLOCK_LEAVES
    ]
    names += [f'stages.{stage}.downsample.reduction.weight' for stage in range(3)]
    return [name for name in names if name not in keys]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise ValueError(f'format {name!r} is unknown; known formats: {", ".join(FORMATS)}')
    return FORMATS[name]


def _reorder_merging(value: Tensor, order: str) -> Tensor:
    """Channels of patch merging (last axis, ``4 * C``) from the other order into ``order``."""
    if order == 'unfold':  # (column, row, C) -> (C, row, column)
        value = value.unflatten(-1, (2, 2, -1)).transpose(-3, -1)
    else:  # (C, row, column) -> (column, row, C)
        value = value.unflatten(-1, (-1, 2, 2)).transpose(-3, -1)
    return value.flatten(-3).contiguous()


def _add_index_buffers(state_dict: dict[str, Tensor], report: ConversionReport) -> None:
    """Stock Swins keep ``relative_position_index`` as a buffer and miss it in a checkpoint."""
    for key in list(state_dict):
        if not key.endswith('relative_position_bias_table'):
            continue
        index = key.removesuffix('bias_table') + 'index'
        if index not in state_dict:
            window_size = (_table_side(state_dict[key]) + 1) // 2
            state_dict[index] = relative_position_index(window_size).to(torch.int64)
            report.added[index] = 'index buffer'
