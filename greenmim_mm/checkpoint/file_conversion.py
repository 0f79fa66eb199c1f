"""Conversion of checkpoint files."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ops import log_spaced_offsets
from ..version import __version__
from .architecture import (
    Architecture,
    check_finite,
    check_numbers,
    check_window_size,
    infer_architecture,
)
from .convert import ConversionReport, canonical_state_dict, convert_with_report
from .files import Checkpoint, check_target, load_checkpoint, write_format
from .formats import FORMATS, detect_format, find_format
from .huggingface import config_pretrained, config_windows, make_config
from .reading import CheckpointError
from .verification import Verification, verify_network
from .writing import atomic_folder, atomic_path, check_space

DTYPES = {'fp16': torch.float16, 'bf16': torch.bfloat16, 'fp32': torch.float32}


class LossError(CheckpointError):
    """A conversion would lose learned parameters, and losses were not allowed."""


@dataclass(frozen=True)
class FileConversion:
    """What :func:`convert_file` did.

    Attributes:
        path: What was written.
        report: The account of every key.
        architecture: The network in it.
        meta: The note that was written with it.
        verification: The comparison with the target's library, if one was asked for.
    """

    path: Path
    report: ConversionReport
    architecture: Architecture
    meta: dict[str, Any]
    verification: Verification | None = None


def convert_file(
    src: str | Path,
    dst: str | Path,
    target: str,
    source: str = 'auto',
    force: bool = False,
    *,
    window_size: int | Sequence[int] | None = None,
    dtype: str | None = None,
    verify: bool = False,
    strict: bool = True,
    trust: bool = False,
) -> FileConversion:
    """Convert the Swin of a checkpoint and write it with a note of where it is from.

    Training state (optimizer, schedules, logs) is left out. The note has ``source_file`` (name),
    ``source_sha256``, ``source_format``, ``format``, ``greenmim_mm_version`` and, where the
    source or its format has one, ``licence``.

    Args:
        src: ``.safetensors``, a file of ``torch.save``, or a folder of Hugging Face's.
        dst: File to write, ``.pth``, ``.pt``, ``.bin`` or ``.safetensors``; for 'huggingface' a
            folder.
        target: Format to make, a key of :data:`~greenmim_mm.checkpoint.FORMATS`.
        source: Format of ``src``; 'auto' finds it out by the names.
        force: Replace ``dst`` if it exists.
        window_size: Windows of the result, one for all stages or one for each; None keeps them.
        dtype: 'fp16', 'bf16' or 'fp32': type of the numbers; None keeps it.
        verify: Compare what was written with GreenSwin before it takes its place, see
            :func:`~greenmim_mm.checkpoint.verify`.
        strict: Refuse to lose learned parameters.
        trust: Read a file that could run code, and let it.

    Returns:
        The account of every key, and what was written.

    Raises:
        FileNotFoundError: If ``src`` or the folder of ``dst`` does not exist.
        FileExistsError: If ``dst`` exists and ``force`` is not given, or it is ``src``.
        CheckpointError: If ``src`` is damaged, holds another architecture, a wrong shape, NaN or
            infinity; it names the key. :class:`LossError` if learned parameters would be lost.
        VerificationError: If the result is not the network that ``src`` is; nothing is written.
        ImportError: If ``verify`` is set and the target's library is not installed.
        ValueError: If an argument makes no sense.
        OSError: If the disk is full or may not be written to; nothing is left there.
    """
    src, dst = Path(src), Path(dst)
    # What can be known to fail without reading a large file fails first.
    check_target(dst, target, force)
    if source != 'auto':
        find_format(source)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f'dtype={dtype!r} is unknown; use one of {", ".join(DTYPES)}')
    if window_size is not None:
        window_size = check_window_size(window_size)
    checkpoint = load_checkpoint(src, trust, mmap=True)
    if dst.exists() and dst.samefile(src):
        raise FileExistsError(f'{dst} is the source itself; write to another one')
    try:
        check_finite(checkpoint.state_dict)
        if source == 'auto':
            source = detect_format(list(checkpoint.state_dict))
        canonical, architecture = read_network(checkpoint, source)
        if window_size is None and architecture.window_sizes is not None:
            # Files of V2 may not tell it, but config.json does.
            window_size = architecture.window_sizes if checkpoint.config else None
        elif window_size is not None:
            architecture = architecture.with_window(window_size)
        state_dict, report = convert_with_report(checkpoint.state_dict, source, target, window_size)
        _set_coords(state_dict, target, architecture)
        config = None
        if target == 'huggingface':
            config = make_config(architecture, state_dict, checkpoint.config)
    except ValueError as error:
        raise CheckpointError(f'{src}: {error}') from error
    if strict and not report.lossless:
        raise LossError(
            f'{src}: {len(report.lost)} learned parameters would be lost, e.g. {report.lost[0]} '
            f'({report.dropped[report.lost[0]]}); write the file without them with --no-strict'
        )
    if strict and (unknown := [k for k, why in report.missing.items() if why.startswith('buffer')]):
        raise LossError(
            f'{src} does not tell its window size, on which {len(unknown)} buffers of {target} '
            f'depend, e.g. {unknown[0]}; give it with --window-size'
        )
    report.left_out = checkpoint.left_out
    kind = DTYPES.get(dtype or '')
    if kind is not None:
        state_dict = {key: _cast(value, kind) for key, value in state_dict.items()}
        if config is not None:
            config['torch_dtype'] = str(kind).removeprefix('torch.')
        try:
            check_finite(state_dict)
        except CheckpointError as error:
            raise CheckpointError(f'{src} does not fit into {dtype}: {error}') from error
    meta = _meta(checkpoint, source, target)
    check_space(dst, sum(value.numel() * value.element_size() for value in state_dict.values()))
    place = atomic_folder if target == 'huggingface' else atomic_path
    verification = None
    with place(dst, force) as temporary:
        write_format(state_dict, temporary, target, meta, config)
        if verify:
            if kind is not None:
                canonical = {key: _cast(value, kind) for key, value in canonical.items()}
            if window_size is not None:
                canonical = _resized(canonical, window_size)
            verification = verify_network(temporary, target, canonical, architecture)
    return FileConversion(dst, report, architecture, meta, verification)


def read_network(checkpoint: Checkpoint, source: str) -> tuple[dict[str, Tensor], Architecture]:
    """Parameters of a checkpoint under canonical names, and their architecture.

    Raises:
        CheckpointError: See :func:`infer_architecture`.
        ValueError: If the keys are not those of the format ``source``.
    """
    check_numbers(checkpoint.state_dict)
    canonical = canonical_state_dict(checkpoint.state_dict, source)
    layout = find_format(source).source_layout(checkpoint.state_dict)
    names = {layout.to_canonical(key): key for key in checkpoint.state_dict}
    architecture = infer_architecture(canonical, names)
    if architecture.window_sizes is None and checkpoint.config is not None:
        if windows := config_windows(checkpoint.config):
            architecture = architecture.with_window(windows)
            pretrained = config_pretrained(checkpoint.config)
            if architecture.version == 2 and pretrained not in (None, windows):
                architecture = replace(architecture, pretrained_window_sizes=pretrained)
    return canonical, architecture


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with path.open('rb') as file:
        while length := file.readinto(buffer):
            digest.update(buffer[:length])
    return digest.hexdigest()


def licence_of(checkpoint: Checkpoint, source: str) -> str | None:
    """Licence note of a checkpoint: its own, or the one that its format implies."""
    return checkpoint.meta.get('licence') or FORMATS[source].licence


def _meta(checkpoint: Checkpoint, source: str, target: str) -> dict[str, Any]:
    meta = dict(
        source_file=checkpoint.path.name,
        source_sha256=sha256(checkpoint.weights_file),
        source_format=source,
        format=target,
        greenmim_mm_version=__version__,
    )
    if licence := licence_of(checkpoint, source):
        meta['licence'] = licence
    return meta


def _set_coords(state_dict: dict[str, Tensor], target: str, architecture: Architecture) -> None:
    """Scale the offsets of V2 as its pre-training did where only ``config.json`` tells how."""
    if architecture.version == 1 or architecture.pretrained_window_sizes is None:
        return
    for key in state_dict:
        if key.endswith('relative_coords_table'):
            stage = int(find_format(target).to_canonical(key).split('.')[1])
            state_dict[key] = log_spaced_offsets(
                architecture.window_sizes[stage], architecture.pretrained_window_sizes[stage]
            )


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _resized(canonical: Mapping[str, Tensor], windows: Sequence[int]) -> dict[str, Tensor]:
    """The same network with windows of another size, under canonical names."""
    named = {'backbone.' + key: value for key, value in canonical.items()}
    resized = convert_with_report(named, 'greenmim_mm', 'greenmim_mm', windows)[0]
    return {key.removeprefix('backbone.'): value for key, value in resized.items()}
