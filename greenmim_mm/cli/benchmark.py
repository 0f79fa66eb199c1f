"""Measures GreenMIM against its peers: speed and memory, on this machine, in one run.

Commands:
  pretrain   steps of GreenMIM, SimMIM and MAE (default)
  grouping   how the time to plan a step grows with the image
  dense      GreenSwin in a detector against mmdet's Swin
  traffic    arithmetic, bytes moved and operators launched in a step, counted and not timed
  data       reading and cropping of images, a second and in each transform

A table in Markdown goes to stdout, progress to stderr. Candidates of a group take turns; medians
are printed with the least and the greatest value. Candidates whose package is missing, or whose
batch does not fit, are listed with the reason. Ctrl-C prints what was measured so far.
"COMMAND --help" lists the options of a command.

Examples:
  greenmim benchmark
  greenmim benchmark --models '*-base*' --repeats 7 --json base.json
  greenmim benchmark --device cuda --amp --batch 128 --find-batch
  greenmim benchmark grouping --pixels 224 1024
  greenmim benchmark dense --arch base --size 800x1216
  greenmim benchmark traffic --models '*-base*' --roofline H100 A100
"""

import argparse
import math
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from ..archs import SWIN_ARCHS
from .errors import Parser, errors_in_one_line
from .options import positive as _positive

COMMANDS = ('pretrain', 'grouping', 'dense', 'traffic', 'data')


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command.

    Returns:
        0, or 130 after an interrupt. Bad input ends it with 2 and one line on stderr.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in (*COMMANDS, '-h', '--help'):
        argv.insert(0, 'pretrain')
    parser = _parser(prog)
    args = parser.parse_args(argv)
    # Not above: `--help` is quick without.
    import torch

    from ..benchmark import data, grouping, measure, report, traffic
    from ..fileio import check_destination

    args.device = torch.device(args.device)
    with errors_in_one_line(parser, OSError, ValueError):
        # What is cheap to check comes before anything is measured.
        if args.json:
            check_destination(args.json, args.force)
        run = _plan(args)
    if args.threads:
        torch.set_num_threads(args.threads)

    results, interrupted = [], False
    on_cuda = args.device.type == 'cuda'
    try:
        # Libraries print to stdout while they build models.
        limit = None if on_cuda else measure.available_memory()
        with redirect_stdout(sys.stderr), measure.memory_limit(limit):
            run(results=results, log=_log)
    except KeyboardInterrupt:
        interrupted = True
        for result in results if 'repeats' in args and args.command != 'data' else ():
            if not result.failure and len(result.seconds) < args.repeats:
                result.failure = f'interrupted after {len(result.seconds)} of {args.repeats} rounds'
    command = shlex.join([*(prog or 'tools/benchmark.py').split(), *argv])
    facts = report.environment(command, args.device, 'bf16 autocast' if args.amp else 'fp32')
    own = {'grouping': grouping.tables, 'traffic': traffic.tables, 'data': data.tables}
    tables = own.get(args.command, report.tables)
    print(report.header(facts), tables(results), sep='\n\n')
    if args.json:
        entries = [asdict(result) for result in results]
        report.write_json(args.json, facts, entries, interrupted, args.force)
    return 130 if interrupted else 0


def _plan(args: argparse.Namespace) -> Callable:
    """Check the options of a command, and make what measures, given ``results`` and ``log``."""
    import torch

    from ..benchmark import candidates, dense, grouping, measure, pretrain, roofline, traffic
    from ..ops import check_mask_ratio, unit_grid

    if args.device.type == 'cuda' and not torch.cuda.is_available():
        raise ValueError('--device cuda: PyTorch finds no CUDA device here; use --device cpu')
    if args.command == 'grouping':
        check_mask_ratio(args.mask_ratio)
        for side in args.pixels:
            unit_grid(side, side)
        names = ('pixels', 'window', 'mask_ratio', 'repeats', 'table_limit')
        return partial(grouping.run, **{name: getattr(args, name) for name in names})
    if args.command == 'data':
        names = ('pixels', 'workers', 'batch', 'repeats')
        return partial(_run_data, args.images, **{name: getattr(args, name) for name in names})
    if args.command == 'traffic':
        changes = dict(peak=args.peak, bandwidth=args.bandwidth, launch=args.launch)
        devices = [roofline.device(name, **changes) for name in args.roofline]
        selected = candidates.select(args.models)
        options = dict(batch=args.batch, devices=devices, amp=args.amp, kernels=args.kernels)
        return partial(traffic.run, candidates=selected, **options)
    # Several steps in a row let CUDA's queue hide the planning of the next one, as in training.
    steps = args.steps or (10 if args.device.type == 'cuda' else 1)
    settings = measure.Settings(args.device, args.repeats, args.warmup, steps, args.amp)
    if args.command == 'dense':
        names = ('arch', 'size', 'window', 'batch')
        return partial(dense.run, settings=settings, **{n: getattr(args, n) for n in names})
    if args.find_batch and args.device.type != 'cuda':
        raise ValueError('--find-batch needs --device cuda')
    selected = candidates.select(args.models)
    options = dict(settings=settings, batch=args.batch, find_batch=args.find_batch)
    return partial(pretrain.run, candidates=selected, **options)


def _run_data(images: Sequence[str] | None, **options) -> None:
    """On the user's images, or on photographs that scikit-image brings, at two sizes."""
    from ..benchmark import data
    from ..demo.scenes import PHOTOGRAPHS, load_photographs

    if images:
        data.run(folders={folder: Path(folder) for folder in images}, **options)
        return
    with TemporaryDirectory() as made:
        photographs = load_photographs([name for names in PHOTOGRAPHS.values() for name in names])
        folders = {}
        for width, height in data.SIZES:
            folder = folders[f'{width} x {height}, JPEG'] = Path(made, f'{width}')
            data.write_photographs(folder, photographs, (width, height))
        data.run(folders=folders, **options)


def _parser(prog: str | None) -> argparse.ArgumentParser:
    summary, _, epilog = __doc__.partition('\n')
    parser = Parser(
        prog=prog,
        description=summary,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest='command', metavar='COMMAND')

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument('--json', metavar='PATH', help='file to write the figures to as well')
    common.add_argument('--force', action='store_true', help='replace PATH if it exists')
    common.set_defaults(device='cpu', amp=False, threads=None)

    rounds = argparse.ArgumentParser(add_help=False)
    rounds.add_argument('--repeats', type=_positive, default=5, help='rounds (default: 5)')

    models = argparse.ArgumentParser(add_help=False)
    models.add_argument('--device', choices=('cpu', 'cuda'), default='cpu', help='default: cpu')
    models.add_argument('--amp', action='store_true', help='bf16 autocast (default: fp32)')
    models.add_argument('--warmup', type=_positive, default=2, help='steps before (default: 2)')
    models.add_argument(
        '--steps', type=_positive, help='steps timed together (default: 1 on a CPU, 10 on CUDA)'
    )
    models.add_argument('--threads', type=_positive, help="default: PyTorch's choice")

    selection = argparse.ArgumentParser(add_help=False)
    selection.add_argument(
        '--models',
        nargs='+',
        metavar='NAME',
        help="names or patterns such as '*-base*'; '?' lists all (default: all)",
    )

    command = commands.add_parser(
        'pretrain', parents=[selection, rounds, common, models], help='the default'
    )
    command.add_argument(
        '--batch', type=_positive, help='default: 8, Swin-L 4; on CUDA 32 times as many'
    )
    command.add_argument(
        '--find-batch', action='store_true', help='find the largest batch that fits on CUDA'
    )

    command = commands.add_parser(
        'grouping', parents=[rounds, common], help='planning, on one core'
    )
    command.add_argument(
        '--pixels', type=_positive, nargs='+', default=[224, 448, 672, 1024], help='image sides'
    )
    command.set_defaults(threads=1)
    command.add_argument('--window', type=_positive, default=7, help='default: 7')
    command.add_argument('--mask-ratio', type=float, default=0.75, help='default: 0.75')
    command.add_argument(
        '--table-limit',
        type=int,
        default=1024,
        help='largest side for which the slow table-filling knapsack is run (default: 1024)',
    )

    command = commands.add_parser('dense', parents=[rounds, common, models], help='in a detector')
    command.add_argument('--arch', choices=list(SWIN_ARCHS), default='tiny', help='default: tiny')
    command.add_argument(
        '--size', type=_size, default='800x1216', metavar='HxW', help='default: 800x1216'
    )
    command.add_argument('--window', type=_positive, default=7, help='default: 7')
    command.add_argument('--batch', type=_positive, default=1, help='default: 1')

    command = commands.add_parser(
        'traffic', parents=[selection, common], help='counted, with estimates for GPUs'
    )
    command.add_argument('--batch', type=_positive, default=256, help='default: 256')
    command.add_argument('--amp', action='store_true', help='bf16 autocast (default: fp32)')
    command.add_argument(
        '--roofline',
        nargs='+',
        default=['H100', 'A100', 'RTX4090'],
        metavar='DEVICE',
        help='estimate times in bf16 for these (default: H100 A100 RTX4090)',
    )
    command.add_argument(
        '--kernels',
        choices=('cuda', 'cpu'),
        default='cuda',
        help="attention's operators: those that are taken there (default: cuda)",
    )
    command.add_argument('--peak', type=_number, help='TFLOP/s, instead of the data sheet')
    command.add_argument('--bandwidth', type=_number, help='TB/s, instead of the data sheet')
    command.add_argument(
        '--launch', type=_number, help='least microseconds of an operator (default: 4)'
    )

    command = commands.add_parser(
        'data', parents=[rounds, common], help='reading and cropping, in worker processes'
    )
    command.add_argument(
        '--images', nargs='+', metavar='DIR', help='default: photographs made at two sizes'
    )
    command.add_argument('--pixels', type=_positive, default=224, help='crops (default: 224)')
    command.add_argument(
        '--workers', type=_positive, nargs='+', default=[1, 2], help='default: 1 2'
    )
    command.add_argument('--batch', type=_positive, default=32, help='default: 32')
    command.set_defaults(threads=1)
    return parser


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f'{text!r} is not a positive number')
    return number


def _size(text: str) -> tuple[int, int]:
    if not re.fullmatch(r'[1-9]\d*x[1-9]\d*', text):
        raise argparse.ArgumentTypeError(f'{text!r} is not a height and width such as 800x1216')
    height, width = text.split('x')
    return int(height), int(width)


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
