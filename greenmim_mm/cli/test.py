"""Evaluates a checkpoint with a config: one of this project, of mmpretrain or of mmdet."""

from collections.abc import Sequence

from .errors import Parser
from .options import run_parser


def make_parser(prog: str | None = None) -> Parser:
    """Options of the command."""
    parser = run_parser(prog, __doc__)
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='checkpoint file or URL')
    parser.add_argument('--out', metavar='FILE.pkl', help='file for the predictions')
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command; bad input ends it with exit code 2 and one line on stderr."""
    parser = make_parser(prog)
    args = parser.parse_args(argv)
    from mmengine.registry import METRICS

    from . import runs

    with runs.errors_of_runs(parser):
        cfg = runs.testing_config(args)
        runner = runs.build_runner(cfg)
        if args.out:
            # Masks of a detector are stored as run lengths: in full they would fill the disk.
            kind = 'DumpDetResults' if cfg.get('default_scope') == 'mmdet' else 'DumpResults'
            metric = METRICS.build(dict(type=kind, out_file_path=args.out))
            runner.test_evaluator.metrics.append(metric)
        runner.test()
