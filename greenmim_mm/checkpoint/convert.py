"""State dict of one format to another, with an account of every key."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import relative_position_index
from .formats import FORMATS, Format


@dataclass
class ConversionReport:
    """What became of each key.

    Attributes:
        mapped: ``{source key: target key}`` of unchanged values.
        transformed: ``{source key: (target key, how)}``.
        dropped: ``{source key: reason}``.
        added: ``{target key: reason}`` of values that were computed.
    """

    mapped: dict[str, str] = field(default_factory=dict)
    transformed: dict[str, tuple[str, str]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)

    @property
    def unknown(self) -> list[str]:
        """Source keys that no table knows."""
        return [key for key, reason in self.dropped.items() if reason == 'unknown name']

    def summary(self) -> str:
        """The account in a few lines; keys of one kind are counted together."""
        lines = [
            f'kept {len(self.mapped) + len(self.transformed)} parameters, '
            f'{len(self.transformed)} of them transformed'
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
        ValueError: If a format is unknown or no key fits ``source``.
    """
    return convert_with_report(state_dict, source, target)[0]


def convert_with_report(
    state_dict: Mapping[str, Tensor], source: str, target: str
) -> tuple[dict[str, Tensor], ConversionReport]:
    """As :func:`convert_state_dict`, with an account of every key."""
    source_format, target_format = _format(source), _format(target)
    report = ConversionReport()
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
    sides = []
    for rows in (table.shape[0], length):
        side = round(rows**0.5)
        if side * side != rows or side % 2 == 0:
            raise ValueError(
                f'a relative position bias table of a square window has (2 * w - 1) ** 2 rows, '
                f'not {rows}'
            )
        sides.append(side)
    old, new = sides
    image = table.float().t().reshape(1, -1, old, old)
    image = F.interpolate(image, size=(new, new), mode='bicubic', align_corners=False)
    return image.reshape(-1, length).t().contiguous().to(table.dtype)


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
            window_size = (round(state_dict[key].shape[0] ** 0.5) + 1) // 2
            state_dict[index] = relative_position_index(window_size).to(torch.int64)
            report.added[index] = 'index buffer'
