"""Pre-trains a Swin on images without labels, and exports it for the libraries that use it.

Examples:
    greenmim pretrain photos/ --out runs/first
    greenmim pretrain photos/ more.txt --out runs/base --model swin-base --devices 4
    greenmim pretrain --out runs/first --resume
"""

import argparse
from collections.abc import Sequence

from .errors import Parser, ended_by_signals
from .options import Pairs, positive
from .pretraining.plan import EXPORTS, MODELS, PRECISIONS, Request


def make_parser(prog: str | None = None) -> Parser:
    """Options of the command. What was not given is not in the namespace."""
    description, _, examples = __doc__.partition('\n\n')
    parser = Parser(
        prog=prog,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add(
        'data',
        metavar='DATA',
        nargs='*',
        help='folders (with all in them), images, and .txt files with a path on each line',
    )
    add('--out', metavar='DIR', required=True, help='folder of the run')
    add('--model', metavar='NAME', help=f'{", ".join(MODELS)} (default: swin-tiny)')
    add('--window', type=positive, metavar='N', help="tokens (default: Swin's own)")
    add('--image-size', type=positive, metavar='N', help='pixels (default: 224, Swin V2 256)')
    add('--init', metavar='FILE', help='weights to start from, of any known format')
    add('--epochs', type=positive, metavar='N', help='default: 12.8 million images are seen')
    add('--batch-size', type=positive, metavar='N', help='images of a step, over all devices')
    add('--accumulate', type=positive, metavar='N', help='compute a step in N parts (default: 1)')
    add('--lr', type=float, metavar='X', help='default: 1.5e-4 (large: 1e-4) for each 256 images')
    add('--devices', type=_devices, metavar='N|auto', help='GPUs, or CPU processes')
    add('--precision', choices=PRECISIONS, help='default: auto')
    add('--workers', type=_natural, metavar='N', help='processes a device that load images')
    add('--seed', type=_natural, metavar='N', help='default: 0')
    add('--resume', action='store_true', help='go on with the run in DIR')
    add('--overwrite', action='store_true', help='start anew in a DIR that holds a run')
    add('--max-bad', metavar='N|P%', help='unreadable images that are passed over (default: 1%%)')
    add(
        '--export',
        type=lambda text: tuple(filter(None, text.split(','))),
        metavar='NAME,...',
        help=f'default: {",".join(EXPORTS)}',
    )
    add('--tensorboard', action='store_true', help='write curves for TensorBoard, too')
    add('--compile', action='store_true', help='let torch compile the step')
    add('--dry-run', action='store_true', help='say what would be done')
    add(
        '--cfg-options',
        nargs='+',
        action=Pairs,
        metavar='KEY=VALUE',
        help='settings of the config, e.g. optim_wrapper.optimizer.weight_decay=0.1',
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command; bad input ends it with exit code 2 and one line on stderr."""
    parser = make_parser(prog)
    given = vars(parser.parse_args(argv))
    flags = {name: given.pop(name, False) for name in ('resume', 'overwrite', 'dry_run')}
    given['data'] = tuple(given.get('data', ()))
    request = Request(**given)

    with ended_by_signals():
        # Not above: `--help` is quick without.
        from . import runs
        from .pretraining.folder import this_command
        from .pretraining.running import pretrain
        from .screen import Screen

        with runs.errors_of_runs(parser, OSError, ImportError):
            pretrain(request, set(given) - {'data'}, this_command(), Screen(), **flags)


def _devices(text: str) -> int | None:
    return None if text == 'auto' else positive(text)


def _natural(text: str) -> int:
    return 0 if text.strip() == '0' else positive(text)
