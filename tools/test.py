"""Evaluates a checkpoint with a config: one of this project, of mmpretrain or of mmdet.

Example:
    python tools/test.py \
        configs/mask_rcnn/mask-rcnn_greenmim-swin-base-w7_fpn_amp-ms-crop-3x_coco.py \
        work_dirs/mask-rcnn_greenmim-swin-base-w7_fpn_amp-ms-crop-3x_coco/epoch_36.pth
"""

import argparse
from collections.abc import Sequence

from _common import (
    UsageError,
    add_common_options,
    build_runner,
    check_data,
    check_file,
    errors_in_one_line,
    load_config,
)
from mmengine.config import Config
from mmengine.registry import METRICS


def parse_args(
    argv: Sequence[str] | None = None,
) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_options(parser)
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='checkpoint file or URL')
    parser.add_argument('--out', metavar='FILE.pkl', help='file for the predictions')
    return parser, parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> Config:
    """Config of the run, checked.

    Raises:
        UsageError: If an option does not fit, or a file is missing.
        DataError: If there is no data.
    """
    cfg = load_config(args)
    if cfg.get('test_dataloader') is None or cfg.get('test_evaluator') is None:
        raise UsageError(
            f'{args.config} has no test_dataloader and test_evaluator; pre-training recipes have '
            'nothing to test, use the recipe of a downstream task'
        )
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        raise UsageError(f'--out {args.out}: predictions are pickled; end the name with .pkl')
    check_file(args.checkpoint, 'checkpoint', 'give the path of a trained checkpoint')
    check_data(cfg, 'test_dataloader')
    cfg.load_from = args.checkpoint
    cfg.resume = False
    if args.amp:
        cfg.test_cfg.fp16 = True
    return cfg


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tool; bad input ends it with exit code 2 and one line on stderr."""
    parser, args = parse_args(argv)
    with errors_in_one_line(parser):
        cfg = prepare(args)
        runner = build_runner(cfg)
        if args.out:
            # Masks of a detector are stored as run lengths: in full they would fill the disk.
            kind = 'DumpDetResults' if cfg.get('default_scope') == 'mmdet' else 'DumpResults'
            metric = METRICS.build(dict(type=kind, out_file_path=args.out))
            runner.test_evaluator.metrics.append(metric)
        runner.test()


if __name__ == '__main__':
    main()
