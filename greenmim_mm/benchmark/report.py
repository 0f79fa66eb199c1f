"""Tables in Markdown, the machine in words, results as JSON."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from ..fileio import atomic_path
from .measure import Result, speedup

# Distributions that carry a package under another name.
_PACKAGES = {
    'torch': (),
    'timm': (),
    'mmengine': ('onedl-mmengine', 'mmengine-lite'),
    'mmcv': ('onedl-mmcv', 'mmcv-lite'),
    'mmpretrain': ('onedl-mmpretrain',),
    'mmdet': ('onedl-mmdetection',),
}


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows (name of the column -> cell) as a table; columns without any content are left out."""
    used = [name for name in rows[0] if any(row[name].strip('-') for row in rows)]
    lines = [used, ['---'] * len(used), *([row[name] for name in used] for row in rows)]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def cell(value: Any, form: str) -> str:
    """A value in a format such as '{:.1f} ms', or a dash for None."""
    return '-' if value is None else form.format(value)


def megabytes(value: float | None) -> str:
    """Bytes in millions of bytes, or a dash."""
    return cell(None if value is None else value / 1e6, '{:.1f} MB')


def less(ours: float | None, theirs: float | None) -> str:
    """By which share ``ours`` is less than ``theirs``, or a dash."""
    return cell(None if ours is None or not theirs else 1 - ours / theirs, '{:.0%}')


def tables(results: Sequence[Result]) -> str:
    """A table for each group; its first candidate is held to the others."""
    sections = []
    for group, members in groupby(results, key=lambda result: result.group):
        first, *others = members
        rows = [_row(result, first) for result in (first, *others)]
        sections.append(f'### {group}\n\n{markdown(rows)}')
    return '\n\n'.join(sections)


def _row(result: Result, first: Result) -> dict[str, str]:
    rate = '-' if result.rate is None else '{:.3g} ({:.3g}-{:.3g})'.format(*result.rate)
    return {
        'candidate': result.label,
        'batch': str(result.batch),
        'images/s, median (min-max)': rate,
        'first row is faster by': cell(speedup(first, result), '{:.2f}x'),
        'planning a step': cell(result.planning_ms, '{:.1f} ms'),
        'AdamW in a step': cell(result.update_ms, '{:.0f} ms'),
        'kept for backward, per image': megabytes(result.kept_per_image),
        'first row keeps less by': less(first.kept_per_image, result.kept_per_image),
        'peak memory': megabytes(result.peak_bytes),
        'first row peaks lower by': less(first.peak_bytes, result.peak_bytes),
        'largest batch': cell(result.largest_batch, '{:d}'),
        'note': '; '.join(filter(None, (result.failure, result.note))),
    }


def environment(command: str, device: torch.device, precision: str) -> dict[str, str]:
    """What a reader must know of where the figures come from.

    Args:
        command: The command line.
        device: Where models ran.
        precision: Their arithmetic.
    """
    facts = {
        'command': command,
        'date': datetime.now(timezone.utc).strftime('%Y-%m-%d %H:%M UTC'),
        'CPU': f'{_cpu_model()}, {os.cpu_count()} cores',
        'threads': str(torch.get_num_threads()),
        'device': device.type,
        'precision': precision,
        'python': platform.python_version(),
    }
    if device.type == 'cuda':
        facts['device'] = f'{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}'
    return facts | {name: _version(name) for name in _PACKAGES}


def header(facts: Mapping[str, str]) -> str:
    """The facts of :func:`environment` as a Markdown list."""
    return '\n'.join(f'- {name}: {value}' for name, value in facts.items())


def write_json(
    path: str | Path,
    facts: Mapping[str, str],
    results: Sequence[Mapping[str, Any]],
    interrupted: bool,
    force: bool,
) -> None:
    """Write facts and results; the file appears whole or not at all.

    Raises:
        FileExistsError: If ``path`` exists and ``force`` is not given, or is a folder.
        FileNotFoundError: If its folder does not exist.
    """
    document = dict(environment=dict(facts), interrupted=interrupted, results=list(results))
    with atomic_path(path, force) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + '\n', encoding='utf-8')


def _cpu_model() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
        return next(line.partition(':')[2].strip() for line in lines if line.startswith('model n'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(name: str) -> str:
    for package in (name, *_PACKAGES[name]):
        with suppress(PackageNotFoundError):
            return version(package) + (f' ({package})' if package != name else '')
    return 'not installed'
