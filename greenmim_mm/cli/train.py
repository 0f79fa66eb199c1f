"""Trains the model of a config: one of this project, of mmpretrain or of mmdet."""

import os
from collections.abc import Sequence

from .errors import Parser
from .options import run_parser


def make_parser(prog: str | None = None) -> Parser:
    """Options of the command."""
    parser = run_parser(prog, __doc__)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='auto|PATH',
        help='continue from a checkpoint; without a path from the last one in the work dir',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate with the batch size, from auto_scale_lr.base_batch_size',
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command; bad input ends it with exit code 2 and one line on stderr."""
    parser = make_parser(prog)
    args = parser.parse_args(argv)
    from . import runs

    with runs.errors_of_runs(parser):
        cfg = runs.training_config(args)
        if told := runs.finished(cfg):
            if os.environ.get('RANK', '0') == '0':
                print(told)
            return
        runs.check_training(cfg)
        runs.build_runner(cfg).train()
