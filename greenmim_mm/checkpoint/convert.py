"""The whole way of a checkpoint: read, resize, spell, write, verify."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..fileio import check_apart
from .architecture import Architecture, check_window_size
from .building import build_line
from .formats import AUTO, find_format
from .huggingface import check_settings, make_config
from .network import network_of, read_network, resize
from .reading import CheckpointError
from .spelling import DTYPES, ConversionReport, Spelling, cast, check_kept, spell
from .writing import check_target, writing

_UNTOLD = (
    'it does not tell its window size, nor that of its pre-training, by which Swin V2 scales '
    'offsets; give both as the model was built, --window-size N and --pretrained-window-size N '
    '(the same N if it never had others)'
)
# Proves that a written file of a format holds a network, and says how.
Verify = Callable[[Path, str, Mapping[str, Tensor], Architecture], Any]


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
        usage: The line of Python that builds the target's model, see :func:`build_line`.
        verification: What ``verify`` found, if it was given.
    """

    path: Path
    report: ConversionReport
    architecture: Architecture
    meta: dict[str, Any]
    usage: str
    verification: Any = None


def convert_file(
    src: str | Path,
    dst: str | Path,
    target: str,
    source: str = AUTO,
    force: bool = False,
    *,
    window_size: int | Sequence[int] | None = None,
    dtype: str | None = None,
    verify: Verify | None = None,
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
        verify: Compares what was written with the network before it takes its place:
            :func:`greenmim_mm.verification.verify_network`, or None for no comparison.
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
        ValueError: If an argument makes no sense.
        OSError: If the disk is full or may not be written to; nothing is left there.
        Exception: What ``verify`` raises if the result is not the network that ``src`` is; nothing
            is written.
    """
    src, dst = Path(src), Path(dst)
    # What can be known to fail without reading a large file fails first.
    check_target(dst, target, force)
    check_apart(src, dst)
    if source != AUTO:
        find_format(source)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f'dtype={dtype!r} is unknown; use one of {", ".join(DTYPES)}')
    for name, sizes in (
        ('window_size', window_size),
        ('pretrained_window_size', pretrained_window_size),
    ):
        if sizes is not None:
            check_window_size(sizes, name=name)
    network = read_network(src, source, trust, key)
    checkpoint, config = network.checkpoint, None
    with _errors_name(src):
        if checkpoint.config is not None and (target != 'huggingface' or verify):
            check_settings(checkpoint.config, network.state_dict)
        network = resize(network, window_size, pretrained_window_size)
        if strict and not network.architecture.scale_is_known:
            # timm's files hold nothing that depends on windows.
            if target != 'timm' or verify or window_size is not None:
                raise LossError(_UNTOLD)
        spelled = spell(network, target)
        check_kept(network, spelled.report)
        if strict:
            _check_lossless(spelled.report)
        state_dict = cast(spelled.state_dict, dtype)
        if target == 'huggingface':
            config = make_config(network.architecture, state_dict, checkpoint.config)
    note, verification = network.note(target), None
    with writing(state_dict, dst, target, note, config, force) as temporary:
        if verify:
            expected = cast(network.state_dict, dtype)
            verification = verify(temporary, target, expected, network.architecture)
    usage = build_line(network.architecture, target, dst, state_dict, config)
    return FileConversion(dst, spelled.report, network.architecture, note, usage, verification)


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
        window_size: As of :func:`resize`.
        pretrained_window_size: As of :func:`resize`; where neither it nor the source's buffers
            tell, those in use **are taken for them**.

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
) -> Spelling:
    """As :func:`convert_state_dict`, with an account of every key."""
    network = resize(network_of(state_dict, source), window_size, pretrained_window_size)
    return spell(network, target)


def _check_lossless(report: ConversionReport) -> None:
    if not report.lossless:
        raise LossError(
            f'{len(report.lost)} learned parameters would be lost, e.g. {report.lost[0]} '
            f'({report.dropped[report.lost[0]]}); write the file without them with --no-strict'
        )


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Errors of the block say of which file they speak."""
    try:
        yield
    except LossError as error:
        raise LossError(f'{path}: {error}') from error
    except ValueError as error:
        raise CheckpointError(f'{path}: {error}') from error
