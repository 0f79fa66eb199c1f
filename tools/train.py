"""Trains the model of a config: one of this project, of mmpretrain or of mmdet.

Example:
    python tools/train.py configs/greenmim/greenmim_swin-tiny-w7_1xb128-amp-coslr-100e_custom.py \
        --cfg-options train_dataloader.dataset.data_root=data/photographs
"""

import argparse
from collections.abc import Sequence

from _common import (
    UsageError,
    add_common_options,
    build_runner,
    check_amp,
    check_data,
    check_file,
    check_pretrained,
    errors_in_one_line,
    load_config,
)
from mmengine.config import Config


def parse_args(
    argv: Sequence[str] | None = None,
) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_options(parser)
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
    return parser, parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> Config:
    """Config of the run, checked.

    Raises:
        UsageError: If an option does not fit, or a file is missing.
        DataError: If there is no data.
    """
    cfg = load_config(args)
    if args.amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            raise UsageError(
                f'--auto-scale-lr: {args.config} does not say which batch its learning rate is '
                'for; give --cfg-options auto_scale_lr.base_batch_size=N as well'
            )
        cfg.auto_scale_lr.enable = True
    if args.resume:
        cfg.resume = True
        cfg.load_from = None
    if args.resume not in (None, 'auto'):
        check_file(
            args.resume,
            '--resume: checkpoint',
            'give the path of a checkpoint, or --resume alone for the last one in the work dir',
        )
        cfg.load_from = args.resume
    check_amp(cfg)
    check_data(cfg, 'train_dataloader', 'val_dataloader')
    check_pretrained(cfg.get('model'))
    return cfg


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tool; bad input ends it with exit code 2 and one line on stderr."""
    parser, args = parse_args(argv)
    with errors_in_one_line(parser):
        build_runner(prepare(args)).train()


if __name__ == '__main__':
    main()
