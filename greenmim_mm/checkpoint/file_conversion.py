"""Conversion of checkpoint files."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
from .huggingface import check_settings, make_config
from .reading import CheckpointError
from .verification import Verification, verify_network
from .windows import (
    scaling_windows,
    windows_note,
    with_chosen_windows,
    with_told_windows,
)
from .writing import atomic_folder, atomic_path, check_apart, check_space

_UNTOLD = (
    'does not tell its window size, nor that of its pre-training, by which Swin V2 scales offsets; '
    'give both as the model was built, --window-size N and --pretrained-window-size N (the same N '
    'if it never had others)'
)
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
    pretrained_window_size: int | Sequence[int] | None = None,
    key: str | None = None,
) -> FileConversion:
    """Convert the Swin of a checkpoint and write it with a note of where it is from.

    Training state (optimizer, schedules, logs) is left out. The note has ``source_file`` (name),
    ``source_sha256``, ``source_format``, ``format``, ``greenmim_mm_version``, ``window_sizes``,
    ``pretrained_window_sizes`` (Swin V2) and, where the source or its format has one, ``licence``.

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
        pretrained_window_size: Windows that a Swin V2 was pre-trained with, if ``src`` does not
            tell; one for all stages or one for each.
        key: Under which ``src`` keeps the parameters, e.g. 'ema_state_dict'; None finds it.

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
    check_apart(src, dst)
    if source != 'auto':
        find_format(source)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f'dtype={dtype!r} is unknown; use one of {", ".join(DTYPES)}')
    if window_size is not None:
        window_size = check_window_size(window_size)
    if pretrained_window_size is not None:
        pretrained_window_size = check_window_size(
            pretrained_window_size, name='pretrained_window_size'
        )
    checkpoint = load_checkpoint(src, trust, mmap=True, key=key)
    if dst.exists() and dst.samefile(src):
        raise FileExistsError(f'{dst} is the source itself; write to another one')
    try:
        if source == 'auto':
            source = detect_format(list(checkpoint.state_dict))
        canonical, architecture = read_network(checkpoint, source)
        if checkpoint.config is not None and (target != 'huggingface' or verify):
            check_settings(checkpoint.config, canonical)
        architecture = with_chosen_windows(architecture, window_size, pretrained_window_size)
        if strict and not architecture.pretraining_told:
            # timm's files hold nothing that depends on windows.
            if target != 'timm' or verify or window_size is not None:
                raise LossError(_UNTOLD)
        if window_size is None and _lacks_windows(canonical, architecture):
            window_size = architecture.window_sizes
        state_dict, report = convert_with_report(
            checkpoint.state_dict, source, target, window_size, scaling_windows(architecture)
        )
        check_finite(_kept(checkpoint.state_dict, report))
        _note_rest(checkpoint, report)
        if not architecture.pretraining_told:
            report.notes.append(_note_untold(architecture))
        config = None
        if target == 'huggingface':
            config = make_config(architecture, state_dict, checkpoint.config)
    except LossError as error:
        raise LossError(f'{src} {error}') from error
    except ValueError as error:
        raise CheckpointError(f'{src}: {error}{_hint(checkpoint)}') from error
    if strict and not report.lossless:
        raise LossError(
            f'{src}: {len(report.lost)} learned parameters would be lost, e.g. {report.lost[0]} '
            f'({report.dropped[report.lost[0]]}); write the file without them with --no-strict'
        )
    report.left_out = checkpoint.left_out
    kind = DTYPES.get(dtype or '')
    if kind is not None:
        state_dict = {key: _cast(key, value, kind) for key, value in state_dict.items()}
        if config is not None:
            config['torch_dtype'] = str(kind).removeprefix('torch.')
        try:
            check_finite(state_dict)
        except CheckpointError as error:
            raise CheckpointError(f'{src} does not fit into {dtype}: {error}') from error
    meta = _meta(checkpoint, source, target) | windows_note(architecture)
    check_space(dst, sum(value.numel() * value.element_size() for value in state_dict.values()))
    place = atomic_folder if target == 'huggingface' else atomic_path
    verification = None
    with place(dst, force) as temporary:
        write_format(state_dict, temporary, target, meta, config)
        if verify:
            if kind is not None:
                canonical = {key: _cast(key, value, kind) for key, value in canonical.items()}
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
    for name, key in names.items():
        _check_type(name, key, checkpoint.state_dict[key])
    return canonical, with_told_windows(architecture, checkpoint)


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


def _check_type(name: str | None, key: str, value: Tensor) -> None:
    """Refuse learned parameters that are no plain floating-point numbers."""
    if name is None or name.endswith('relative_position_index'):
        return
    if value.layout != torch.strided:
        raise CheckpointError(f'{key} is a sparse tensor; learned parameters are dense')
    if not value.is_floating_point():
        kind = str(value.dtype).removeprefix('torch.')
        raise CheckpointError(
            f'{key} has numbers of type {kind}; learned parameters are floating-point numbers'
        )


def _kept(state_dict: Mapping[str, Tensor], report: ConversionReport) -> dict[str, Tensor]:
    kept = report.mapped.keys() | report.transformed.keys()
    return {key: value for key, value in state_dict.items() if key in kept}


def _note_rest(checkpoint: Checkpoint, report: ConversionReport) -> None:
    """Tell of what a file holds that was never taken for a parameter."""
    for key in checkpoint.skipped:
        known = find_format(report.source).to_canonical(key) is not None
        report.drop(key, 'not a tensor with a name', lost=known)
    if 'ema_state_dict' in checkpoint.left_out:
        report.notes.append('the file has averaged weights, too; --key ema_state_dict takes them')


def _hint(checkpoint: Checkpoint) -> str:
    if not checkpoint.skipped:
        return ''
    return (
        f' ({len(checkpoint.skipped)} entries are no tensors with a name, such as numpy arrays, '
        f'e.g. {checkpoint.skipped[0]})'
    )


def _lacks_windows(canonical: Mapping[str, Tensor], architecture: Architecture) -> bool:
    """Whether the parameters do not tell windows that are known all the same."""
    return architecture.version == 2 and not any(
        key.endswith('relative_coords_table') for key in canonical
    )


def _note_untold(architecture: Architecture) -> str:
    if architecture.window_sizes is None:
        return (
            'the source does not tell the windows of this Swin V2, and the result does not either'
        )
    return (
        'the source does not tell the windows of its pre-training, by which Swin V2 scales '
        f'offsets; they are taken to be those in use, {architecture.window_sizes}'
    )


def _cast(key: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    # Offsets are no weights: rounded, they would shift every bias of a Swin V2.
    learned = value.is_floating_point() and not key.endswith('relative_coords_table')
    return value.to(dtype) if learned else value


def _resized(canonical: Mapping[str, Tensor], windows: Sequence[int]) -> dict[str, Tensor]:
    """The same network with windows of another size, under canonical names."""
    named = {'backbone.' + key: value for key, value in canonical.items()}
    resized = convert_with_report(named, 'greenmim_mm', 'greenmim_mm', windows)[0]
    return {key.removeprefix('backbone.'): value for key, value in resized.items()}
