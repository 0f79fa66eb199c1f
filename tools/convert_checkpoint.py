"""Converts checkpoints of Swin between libraries, and says what a checkpoint is.

Examples:
    python tools/convert_checkpoint.py work_dirs/greenmim/epoch_200.pth swin.pth --to mmdet
    python tools/convert_checkpoint.py simmim.pth swin.pth --to mmdet --window-size 7 --verify
    python tools/convert_checkpoint.py inspect swin.pth

Exit codes: 0, all is well; 1, --verify found another network and nothing was written; 2, refused,
with the reason on stderr; 3, written, but learned parameters were lost (--no-strict).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from greenmim_mm.checkpoint import (
    FORMATS,
    FileConversion,
    VerificationError,
    atomic_path,
    check_destination,
    convert_file,
    inspect_checkpoint,
)

_WRONG_NETWORK, _REFUSED, _LOST = 1, 2, 3


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tool; bad input ends it with exit code 2 and one line on stderr."""
    argv = list(sys.argv[1:] if argv is None else argv)
    inspecting = argv[:1] == ['inspect']
    parser = _inspect_parser() if inspecting else _convert_parser()
    args = parser.parse_args(argv[inspecting:])
    try:
        code = _inspect(args) if inspecting else _convert(args)
    except (OSError, ValueError, ImportError) as error:
        code = _WRONG_NETWORK if isinstance(error, VerificationError) else _REFUSED
        message = ' '.join(str(error).split())
        parser.exit(code, f'{parser.prog}: error: {message}\n')
    if code:
        parser.exit(code)


def _inspect(args: argparse.Namespace) -> int:
    print(inspect_checkpoint(args.src, args.source, args.trust).summary())
    return 0


def _convert(args: argparse.Namespace) -> int:
    if args.report is not None:
        check_destination(args.report, args.force)
    result = convert_file(
        args.src,
        args.dst,
        args.to,
        args.source,
        args.force,
        window_size=args.window_size,
        dtype=args.dtype,
        verify=args.verify,
        strict=args.strict,
        trust=args.trust,
    )
    print(result.architecture.describe())
    if args.verbose:
        print(json.dumps(_account(result), indent=2))
    print(result.report.summary())
    if licence := result.meta.get('licence'):
        print(f'licence: {licence}')
    if result.verification is not None:
        print(f'verified: {result.verification.summary()}')
    print(f'wrote {args.dst}')
    if args.report is not None:
        with atomic_path(args.report, args.force) as temporary:
            temporary.write_text(json.dumps(_account(result), indent=2) + '\n', 'utf-8')
        print(f'wrote {args.report}')
    return 0 if result.report.lossless else _LOST


def _account(result: FileConversion) -> dict:
    """All that is known about a conversion, for JSON."""
    account = dict(
        report=asdict(result.report) | {'lossless': result.report.lossless},
        architecture=asdict(result.architecture) | {'name': result.architecture.name},
        meta=result.meta,
    )
    if result.verification is not None:
        account['verification'] = asdict(result.verification)
    return account


def _convert_parser() -> argparse.ArgumentParser:
    description, _, examples = __doc__.partition('\n\n')
    formats = '\n'.join(f'  {entry.name}: {entry.description}' for entry in FORMATS.values())
    parser = argparse.ArgumentParser(
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
    parser.add_argument('--to', required=True, choices=tuple(FORMATS), help='format to make')
    parser.add_argument(
        '--window-size',
        type=_window_size,
        metavar='N',
        help='windows of the result, N or N,N,N,N; bias tables are resized (default: as in SRC)',
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
    parser.add_argument('--force', action='store_true', help='replace DST if it exists')
    parser.add_argument('--report', type=Path, metavar='FILE.json', help='write the full account')
    parser.add_argument('--verbose', action='store_true', help='print the full account')
    return parser


def _inspect_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f'{Path(sys.argv[0]).name} inspect', description='Says what a checkpoint is.'
    )
    _add_source(parser)
    return parser


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('src', metavar='SRC', help="file, or folder of Hugging Face's")
    parser.add_argument(
        '--from',
        dest='source',
        default='auto',
        choices=('auto', *FORMATS),
        help='format of SRC (default: found out by the names)',
    )
    parser.add_argument(
        '--trust',
        action='store_true',
        help='read SRC even if that runs code; only for files whose makers you trust',
    )


def _window_size(text: str) -> int | tuple[int, ...]:
    sizes = tuple(int(part) for part in text.split(','))
    return sizes[0] if len(sizes) == 1 else sizes


if __name__ == '__main__':
    main()
