"""Converts checkpoints of Swin between libraries.

Examples:
    greenmim convert work_dirs/greenmim/epoch_200.pth swin.pth --to mmdet
    greenmim convert simmim.pth swin.pth --to mmdet --window-size 7 --verify

Exit codes: 0, all is well; 1, --verify found another network and nothing was written; 2, refused,
with the reason on stderr; 3, written, but learned parameters were lost (--no-strict); 130, 143 and
129, ended by Ctrl-C or a signal.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..archs import FORMAT_NAMES
from ..fileio import atomic_path, check_apart, check_destination
from ..text import printable
from .errors import Parser, UserError, ended_by_signals, errors_in_one_line

if TYPE_CHECKING:
    from ..checkpoint import FileConversion

_WRONG_NETWORK, _LOST = 1, 3


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command; bad input ends it with exit code 2 and one line on stderr.

    Args:
        argv: Arguments; behind the word ``inspect`` they are those of :func:`main_inspect`.
        prog: Name of the program in messages.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    inspecting = argv[:1] == ['inspect']
    prog = prog or Path(sys.argv[0]).name
    parser = _inspect_parser(f'{prog} inspect') if inspecting else _convert_parser(prog)
    _run(parser, argv, inspecting)


def main_inspect(argv: Sequence[str] | None = None, prog: str = 'inspect') -> None:
    """Say what a checkpoint is."""
    _run(_inspect_parser(prog), ['inspect', *(sys.argv[1:] if argv is None else argv)], True)


def _run(parser: argparse.ArgumentParser, argv: Sequence[str], inspecting: bool) -> None:
    args = parser.parse_args(argv[inspecting:])
    # Here and below: what --help needs is quick to import, and torch is not.
    from ..verification import VerificationError

    codes = {VerificationError: _WRONG_NETWORK}
    with errors_in_one_line(parser, OSError, ValueError, ImportError, codes=codes):
        with ended_by_signals(), _lack_of_memory_named():
            code, text = _inspect(args) if inspecting else _convert(args)
    _print(text)
    if code:
        parser.exit(code)


def _print(text: str) -> None:
    """Prints; that nobody listens (``| head``) is no failure of a conversion that is done."""
    encoding = sys.stdout.encoding or 'utf-8'
    try:
        print(text.encode(encoding, 'backslashreplace').decode(encoding), flush=True)
    except BrokenPipeError:
        # Or the interpreter complains when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _lack_of_memory_named() -> Iterator[None]:
    """Lack of memory is the user's to mend; torch has no class of its own for it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and 'allocate' not in str(error):
            raise
        raise UserError(f'out of memory: {str(error) or type(error).__name__}') from error


def _inspect(args: argparse.Namespace) -> tuple[int, str]:
    from ..checkpoint import inspect_checkpoint

    return 0, inspect_checkpoint(args.src, args.source, args.trust).summary()


def _check_report(args: argparse.Namespace) -> None:
    """Raises before any work if the report cannot be written, or would destroy SRC or DST."""
    for path in map(Path, (args.src, args.dst)):
        same = path.exists() and args.report.exists() and path.samefile(args.report)
        if same or path.resolve() == args.report.resolve():
            raise FileExistsError(f'--report {args.report} is {path}; give it a file of its own')
        check_apart(path, args.report)
    check_destination(args.report, args.force)


def _convert(args: argparse.Namespace) -> tuple[int, str]:
    from ..checkpoint import convert_file
    from ..verification import verify_network

    if args.report is not None:
        _check_report(args)
    result = convert_file(
        args.src,
        args.dst,
        args.to,
        args.source,
        args.force,
        window_size=args.window_size,
        pretrained_window_size=args.pretrained_window_size,
        dtype=args.dtype,
        verify=verify_network if args.verify else None,
        strict=args.strict,
        trust=args.trust,
        key=args.key,
    )
    lines = [result.architecture.describe()]
    if args.verbose:
        lines.append(json.dumps(_account(result), indent=2))
    lines.append(result.report.summary())
    if licence := result.meta.get('licence'):
        lines.append(f'licence: {printable(licence)}')
    if result.verification is not None:
        lines.append(f'verified: {result.verification.summary()}')
    lines.append(f'wrote {args.dst}')
    lines.append(f'build it with: {printable(result.usage, 2000)}')
    if args.report is not None:
        with atomic_path(args.report, args.force) as temporary:
            temporary.write_text(json.dumps(_account(result), indent=2) + '\n', 'utf-8')
        lines.append(f'wrote {args.report}')
    return 0 if result.report.lossless else _LOST, '\n'.join(lines)


def _account(result: 'FileConversion') -> dict:
    """All that is known about a conversion, for JSON."""
    account = dict(
        report=asdict(result.report) | {'lossless': result.report.lossless},
        architecture=asdict(result.architecture) | {'name': result.architecture.name},
        meta=result.meta,
        usage=result.usage,
    )
    if result.verification is not None:
        account['verification'] = asdict(result.verification)
    return account


def _convert_parser(prog: str) -> argparse.ArgumentParser:
    description, _, examples = __doc__.partition('\n\n')
    formats = '\n'.join(f'  {name}: {text}' for name, text in FORMAT_NAMES.items())
    parser = Parser(
        prog=prog,
        description=description,
        epilog=f'{examples}\nformats:\n{formats}',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_source(parser)
    parser.add_argument(
        'dst',
        metavar='DST',
        help='file to write: .pth, .pt, .bin or .safetensors; for huggingface a folder',
    )
    parser.add_argument('--to', required=True, choices=tuple(FORMAT_NAMES), help='format to make')
    parser.add_argument(
        '--window-size',
        type=_window_size,
        metavar='N',
        help='windows of the result, N or N,N,N,N; bias tables are resized (default: as in SRC)',
    )
    parser.add_argument(
        '--pretrained-window-size',
        type=_window_size,
        metavar='N',
        help='windows that a Swin V2 was pre-trained with, N or N,N,N,N, if SRC does not tell',
    )
    parser.add_argument(
        '--dtype', choices=('fp16', 'bf16', 'fp32'), help='type of the numbers (default: as in SRC)'
    )
    parser.add_argument(
        '--verify',
        action='store_true',
        help="load the result into the target's library and compare its features with GreenSwin's",
    )
    parser.add_argument(
        '--strict',
        action=argparse.BooleanOptionalAction,
        default=True,
        help='refuse to lose learned parameters (default)',
    )
    parser.add_argument(
        '--key', help='where SRC keeps the parameters, e.g. ema_state_dict (default: found out)'
    )
    parser.add_argument('--force', action='store_true', help='replace DST if it exists')
    parser.add_argument('--report', type=Path, metavar='FILE.json', help='write the full account')
    parser.add_argument('--verbose', action='store_true', help='print the full account')
    return parser


def _inspect_parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description='Says what a checkpoint is.')
    _add_source(parser)
    return parser


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('src', metavar='SRC', help="file, or folder of Hugging Face's")
    parser.add_argument(
        '--from',
        dest='source',
        default='auto',
        choices=('auto', *FORMAT_NAMES),
        help='format of SRC (default: found out by the names)',
    )
    parser.add_argument(
        '--trust',
        action='store_true',
        help='read SRC even if that runs code; only for files whose makers you trust',
    )


def _window_size(text: str) -> int | tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(','))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f'{text[:50]!r} is no window size; give N, or N,N,N,N for the four stages'
        ) from None
    return sizes[0] if len(sizes) == 1 else sizes
