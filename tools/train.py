"""Trains the model of a config: one of this project, of mmpretrain or of mmdet.

Example:
    python tools/train.py configs/custom/greenmim_swin-tiny-w7_1xb128-amp-coslr-100e_custom.py \
        --cfg-options train_dataloader.dataset.data_root=data/photographs
"""

import argparse
import os
from collections.abc import Sequence
from importlib.util import find_spec

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
from mmengine.device import get_device


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
    strategy = _strategy(cfg)
    if args.amp:
        if strategy == 'DeepSpeedStrategy':
            raise UsageError(
                "--amp: DeepSpeed's precision is a setting of its strategy; give --cfg-options "
                'strategy.bf16.enabled=True'
            )
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
        # Checkpoints of shards are folders.
        if strategy is None or not os.path.isdir(args.resume):
            check_file(
                args.resume,
                '--resume: checkpoint',
                'give the path of a checkpoint, or --resume alone for the last one in the work dir',
            )
        cfg.load_from = args.resume
    check_amp(cfg)
    check_strategy(cfg)
    check_data(cfg, 'train_dataloader', 'val_dataloader')
    check_pretrained(cfg.get('model'))
    return cfg


def check_strategy(cfg: Config) -> None:
    """Raise :class:`UsageError` if the config's strategy for several processes cannot run."""
    strategy = _strategy(cfg)
    if strategy is None:
        return
    if cfg.get('runner_type') != 'FlexibleRunner':
        raise UsageError(
            f'strategy={strategy} would not be used: only FlexibleRunner has strategies; set '
            "runner_type='FlexibleRunner' in the config"
        )
    if strategy == 'DeepSpeedStrategy' and find_spec('deepspeed') is None:
        raise UsageError(
            f'strategy={strategy} needs the package deepspeed, which is not installed: pip install '
            'deepspeed, or shard with configs/_base_/strategies/fsdp.py'
        )
    if strategy not in ('DeepSpeedStrategy', 'FSDPStrategy'):
        return
    if cfg.launcher == 'none':
        raise UsageError(
            f'strategy={strategy} shards among processes that a launcher has started; use bash '
            'tools/dist_train.sh CONFIG GPUS'
        )
    wrapper = cfg.strategy.get('model_wrapper') or {}
    if get_device() == 'cpu' and wrapper.get('device_id') != 'cpu':
        raise UsageError(
            f'strategy={strategy} needs GPUs and none is available; train without it, by the '
            'recipe that this one inherits'
        )


def _strategy(cfg: Config) -> str | None:
    """Name of the strategy's class without its module; None if the config has no strategy."""
    kind = (cfg.get('strategy') or {}).get('type')
    return kind and (kind if isinstance(kind, str) else kind.__name__).rpartition('.')[2]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tool; bad input ends it with exit code 2 and one line on stderr."""
    parser, args = parse_args(argv)
    with errors_in_one_line(parser):
        build_runner(prepare(args)).train()


if __name__ == '__main__':
    main()
