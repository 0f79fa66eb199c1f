"""Configs of training and testing: read, changed by options, checked before anything is built.

What the user can mend raises :class:`UserError`, or :class:`~greenmim_mm.datasets.DataError`.
"""

import argparse
import errno
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_distributed
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from ..compat import compiles_plans
from ..datasets import DataError, UnreadableImageError, check_contents, check_dataset
from ..engine.checkpoints import CheckpointError, damage, last_checkpoint, read_meta
from ..engine.hooks import Interruption, NonFiniteLossError, ResumeError
from .errors import UserError, errors_in_one_line, one_line
from .overrides import merge_options
from .recipes import recipe_folder


@contextmanager
def errors_of_runs(parser: argparse.ArgumentParser, *more: type[BaseException]) -> Iterator[None]:
    """End the program with one line where the config, an option or the data is at fault.

    So does a signal that a run has listened to, with its own code, and what a run cannot go on
    with: code 1 if the disk or the numbers are at fault.

    Args:
        parser: Knows the program's name.
        *more: Other errors that are the user's to mend.
    """
    expected = (DataError, UnreadableImageError, ResumeError, *more)
    codes = {CheckpointError: 1, NonFiniteLossError: 1}
    with errors_in_one_line(parser, *expected, codes=codes):
        try:
            yield
        except Interruption as error:
            # All processes end with it; one tells.
            told = os.environ.get('RANK', '0') == '0'
            parser.exit(error.code, f'{parser.prog}: {one_line(error)}\n' if told else None)
        except OSError as error:
            # Logs are written more often than checkpoints: a full disk may show there first.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            told = f'{error.strerror}; make room and go on with the same command and --resume'
            raise CheckpointError(told) from error
        except AssertionError as error:
            # mmdet's recipes load with mmcv's transform; other assertions are no user's fault.
            if 'failed to load image: ' not in str(error):
                raise
            raise UserError(str(error)) from error


def training_config(args: argparse.Namespace) -> Config:
    """Config of a training run with all options applied."""
    cfg = load_config(args)
    strategy = _strategy(cfg)
    if args.amp:
        if strategy == 'DeepSpeedStrategy':
            raise UserError(
                "--amp: DeepSpeed's precision is a setting of its strategy; give --cfg-options "
                'strategy.bf16.enabled=True'
            )
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            raise UserError(
                f'--auto-scale-lr: {args.config} does not say which batch its learning rate is '
                'for; give --cfg-options auto_scale_lr.base_batch_size=N as well'
            )
        cfg.auto_scale_lr.enable = True
    if args.resume:
        path = last_checkpoint(cfg.work_dir) if args.resume == 'auto' else args.resume
        # Killed before its first checkpoint, a run starts anew, from what the config says.
        cfg.resume = path is not None
        if path is not None:
            cfg.load_from = str(path)
    if args.resume not in (None, 'auto'):
        remedy = 'give the path of a checkpoint, or --resume alone for the last one in the work dir'
        # Checkpoints of shards are folders.
        if strategy is None or not os.path.isdir(args.resume):
            check_file(args.resume, '--resume: checkpoint', remedy)
        if '://' not in args.resume and (reason := damage(args.resume)):
            raise UserError(f'--resume: checkpoint {args.resume} is damaged ({reason}); {remedy}')
    return cfg


def check_training(cfg: Config) -> None:
    """Raise :class:`UserError` or :class:`DataError` if a training run cannot start."""
    if cfg.get('compile') and (reason := compiler_obstacle()):
        print_log(f'compile={cfg.compile} is left out: {reason}', 'current', logging.WARNING)
        cfg.compile = False
    check_amp(cfg)
    check_strategy(cfg)
    check_accumulation(cfg)
    check_layer_decay(cfg)
    check_data(cfg, 'train_dataloader', 'val_dataloader')
    check_pretrained(cfg.get('model'))


def compiler_obstacle() -> str | None:
    """Why torch.compile cannot work here, None if nothing is known that speaks against it."""
    if not compiles_plans():
        return f'TorchDynamo of torch {torch.__version__} fails on plans; use a later one'
    compilers = [os.environ['CXX']] if 'CXX' in os.environ else ['g++', 'clang++', 'c++']
    if not any(map(shutil.which, compilers)):
        return f'there is no C++ compiler ({", ".join(compilers)}); install g++'
    if get_device() == 'cuda' and find_spec('triton') is None:
        return 'the package triton is not installed; pip install triton'
    return None


def testing_config(args: argparse.Namespace) -> Config:
    """Config of a test with all options applied, checked."""
    cfg = load_config(args)
    if cfg.get('test_dataloader') is None or cfg.get('test_evaluator') is None:
        raise UserError(
            f'{args.config} has no test_dataloader and test_evaluator; pre-training recipes have '
            'nothing to test, use the recipe of a downstream task'
        )
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        raise UserError(f'--out {args.out}: predictions are pickled; end the name with .pkl')
    check_file(args.checkpoint, 'checkpoint', 'give the path of a trained checkpoint')
    check_data(cfg, 'test_dataloader')
    cfg.load_from = args.checkpoint
    cfg.resume = False
    if args.amp:
        cfg.test_cfg.fp16 = True
    return cfg


def load_config(args: argparse.Namespace) -> Config:
    """Read the config and apply the options that all runs have."""
    path = find_config(args.config)
    try:
        cfg = Config.fromfile(path)
    except (FileNotFoundError, ModuleNotFoundError) as error:
        raise UserError(f'config {args.config} needs what is not there: {error}') from error
    merge_options(cfg, args.cfg_options or {})
    cfg.launcher = args.launcher
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', path.stem)
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        loader = cfg.get(name)
        if not isinstance(loader, Mapping):
            continue
        if cfg.get('default_scope') == 'mmpretrain':
            # mmpretrain's recipes rely on its own tools to set these.
            loader.setdefault('pin_memory', True)
            loader.setdefault('persistent_workers', True)
            loader.setdefault('collate_fn', dict(type='default_collate'))
        if not loader.get('num_workers'):
            # PyTorch refuses to keep workers that do not exist.
            loader.persistent_workers = False
    return cfg


def find_config(name: str) -> Path:
    """Path of a config file, or of ``<package>::<path>`` among the configs of a package."""
    package, separator, relative = name.partition('::')
    if not separator:
        path = Path(name)
        if not path.is_file():
            raise UserError(f'config {name} does not exist; recipes lie in {recipe_folder()}')
        return path
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f'config {name}: package {package!r} is not installed; install it first')
    folder = Path(spec.submodule_search_locations[0]) / '.mim' / 'configs'
    if not (folder / relative).is_file():
        raise UserError(f'config {name} does not exist; configs of {package} lie in {folder}')
    return folder / relative


def finished(cfg: Config) -> str:
    """Say that the run which a config resumes has ended; empty if it has not, or none can tell."""
    if not cfg.get('resume'):
        return ''
    path = cfg.get('load_from')
    meta = read_meta(path) if path else {}
    for unit in ('epoch', 'iter'):
        end = (cfg.get('train_cfg') or {}).get(f'max_{unit}s')
        if end is not None and meta.get(unit, 0) >= end:
            return (
                f'{path} is finished ({unit} {meta[unit]} of {end}); to train on, raise '
                f'train_cfg.max_{unit}s with --cfg-options'
            )
    return ''


def check_data(cfg: Config, *names: str) -> None:
    """Check the files of the data loaders ``names``."""
    for name in names:
        loader = cfg.get(name)
        if isinstance(loader, Mapping) and 'dataset' in loader:
            check_dataset(loader['dataset'], f'{name}.dataset')
            check_contents(loader['dataset'], f'{name}.dataset', cfg.get('model'))


def check_file(path: str, what: str, remedy: str) -> None:
    """Raise :class:`UserError` if a local file does not exist; URLs pass."""
    if '://' not in path and not os.path.isfile(path):
        raise UserError(f'{what} {path} does not exist; {remedy}')


def check_pretrained(model: Any, name: str = 'model') -> None:
    """Check that the checkpoints which a model is to start from exist."""
    if isinstance(model, (list, tuple)):
        for index, value in enumerate(model):
            check_pretrained(value, f'{name}.{index}')
    elif isinstance(model, Mapping):
        if model.get('type') == 'Pretrained' and isinstance(model.get('checkpoint'), str):
            check_file(
                model['checkpoint'],
                'checkpoint',
                f'{name} starts from it: pre-train first, name another with --cfg-options '
                f'{name}.checkpoint=PATH, or train from scratch with {name}=None',
            )
        for key, value in model.items():
            check_pretrained(value, f'{name}.{key}')


def check_amp(cfg: Config) -> None:
    """Raise :class:`UserError` if the config wants mixed precision and there is no GPU."""
    if _class_name(cfg.get('optim_wrapper')) == 'AmpOptimWrapper' and not _has_gpu():
        raise UserError(
            'mixed precision (optim_wrapper.type=AmpOptimWrapper) needs a GPU and none is '
            'available; train in full precision with --cfg-options optim_wrapper.type=OptimWrapper'
        )


def check_strategy(cfg: Config) -> None:
    """Raise :class:`UserError` if the config's strategy for several processes cannot run."""
    strategy = _strategy(cfg)
    if strategy is None:
        return
    if cfg.get('runner_type') != 'FlexibleRunner':
        raise UserError(
            f'strategy={strategy} would not be used: only FlexibleRunner has strategies; set '
            "runner_type='FlexibleRunner' in the config"
        )
    if strategy == 'DeepSpeedStrategy' and find_spec('deepspeed') is None:
        raise UserError(
            f'strategy={strategy} needs the package deepspeed, which is not installed: pip install '
            'deepspeed, or shard with configs/_base_/strategies/fsdp.py'
        )
    if strategy not in ('DeepSpeedStrategy', 'FSDPStrategy'):
        return
    if cfg.launcher == 'none':
        raise UserError(
            f'strategy={strategy} shards among processes that a launcher has started: start them '
            'with torchrun, and give --launcher pytorch'
        )
    wrapper = cfg.strategy.get('model_wrapper') or {}
    if not _has_gpu() and wrapper.get('device_id') != 'cpu':
        raise UserError(
            f'strategy={strategy} needs GPUs and none is available; train without it, by the '
            'recipe that this one inherits'
        )


def check_accumulation(cfg: Config) -> None:
    """Raise :class:`UserError` if a learning rate would be scaled to a part of the batch."""
    strategy = _strategy(cfg)
    steps = (cfg.get('strategy') or {}).get('gradient_accumulation_steps', 1)
    if _scales_lr(cfg) and strategy and max(steps, _accumulative_counts(cfg)) > 1:
        raise UserError(
            f'--auto-scale-lr: with strategy={strategy} gradients that are accumulated are not '
            'counted; leave it out and set optim_wrapper.optimizer.lr'
        )


def check_layer_decay(cfg: Config) -> None:
    """Raise :class:`UserError` if learning rates cannot fall from layer to layer as asked."""
    paramwise = (cfg.get('optim_wrapper') or {}).get('paramwise_cfg') or {}
    rate = paramwise.get('layer_decay_rate', 1)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate <= 1:
        raise UserError(
            f'optim_wrapper.paramwise_cfg.layer_decay_rate={rate} must lie in (0, 1]; 1 is the '
            'same learning rate for all layers'
        )


def build_runner(cfg: Config, kind: type[Runner] = Runner) -> Runner:
    """Build the runner that the config names, or one of ``kind``."""
    _prepare_processes(cfg)
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else kind.from_cfg(cfg)
    counts = _accumulative_counts(cfg)
    if _scales_lr(cfg) and counts > 1 and _strategy(cfg) is None:
        # mmengine counts the images of a step; an update sees those of several. Not in the config,
        # which is stored beside the run: read again, it would be scaled twice.
        base = cfg.auto_scale_lr.base_batch_size
        runner.auto_scale_lr = dict(cfg.auto_scale_lr, base_batch_size=base / counts)
        runner.logger.info(
            f'The learning rate is for a batch of {base}; an update accumulates {counts} steps, so '
            f'it is scaled as for steps of {base / counts:g}.'
        )
    return runner


def _prepare_processes(cfg: Config) -> None:
    """Let the processes of a distributed run meet without GPUs, too: mmengine only knows GPUs."""
    if cfg.launcher == 'none':
        return
    if _has_gpu():
        check_gpu_of_process(cfg.launcher)
        return
    if not is_distributed():
        join_without_gpu(cfg.launcher)
    unused = cfg.get('find_unused_parameters', False)
    wrapper = dict(broadcast_buffers=False, find_unused_parameters=unused)
    # None: modules on the CPU have no device ids.
    cfg.model_wrapper_cfg = wrapper | (cfg.get('model_wrapper_cfg') or {}) | dict(device_ids=None)


def check_gpu_of_process(launcher: str) -> None:
    """Raise :class:`UserError` if a launcher has started more processes than there are GPUs."""
    rank, count = int(os.environ.get('LOCAL_RANK', 0)), torch.cuda.device_count()
    if launcher == 'pytorch' and 0 < count <= rank:
        raise UserError(f'process {rank} of this machine has no GPU: start {count}')


def join_without_gpu(launcher: str) -> None:
    """Join the other processes of a launcher on CPUs.

    Raises:
        UserError: If the launcher is for GPUs.
    """
    if launcher != 'pytorch':
        raise UserError(
            f'--launcher {launcher} needs GPUs and none is available; on CPUs start the processes '
            'with torchrun, and give --launcher pytorch'
        )
    torch.distributed.init_process_group('gloo')


def _has_gpu() -> bool:
    return get_device() not in ('cpu', 'mps')


def _scales_lr(cfg: Config) -> bool:
    return bool((cfg.get('auto_scale_lr') or {}).get('enable'))


def _accumulative_counts(cfg: Config) -> int:
    return (cfg.get('optim_wrapper') or {}).get('accumulative_counts', 1)


def _strategy(cfg: Config) -> str | None:
    return _class_name(cfg.get('strategy'))


def _class_name(cfg: Mapping[str, Any] | None) -> str | None:
    """Name of the class that a dict is for, without its module; None if it names none."""
    kind = (cfg or {}).get('type')
    return kind and (kind if isinstance(kind, str) else kind.__name__).rpartition('.')[2]
