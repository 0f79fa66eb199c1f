"""What train.py and test.py share: options, the config, and errors in one line."""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from greenmim_mm.datasets import DataError, UnreadableImageError, check_dataset


class UsageError(ValueError):
    """The user's input is at fault; the message says what to do."""


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that both tools have."""
    parser.add_argument(
        'config', metavar='CONFIG', help="config file, or 'mmdet::...' / 'mmpretrain::...'"
    )
    parser.add_argument(
        '--work-dir', help='folder for logs and checkpoints (default: work_dirs/<config name>)'
    )
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='settings to change in the config, e.g. train_dataloader.batch_size=64',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what started the processes of a distributed run',
    )
    # Older launchers of PyTorch pass it, newer ones set LOCAL_RANK.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


@contextmanager
def errors_in_one_line(parser: argparse.ArgumentParser) -> Iterator[None]:
    """End the program with code 2 and one line on stderr if the user's input is at fault."""
    try:
        yield
    except (UsageError, DataError) as error:
        message = str(error)
    except (UnreadableImageError, AssertionError) as error:
        # A worker's error arrives as a text that ends with the line we want.
        message = str(error).strip().rpartition('\n')[2]
        if isinstance(error, AssertionError) and 'failed to load image: ' not in message:
            raise
        message = message.removeprefix(f'{UnreadableImageError.__module__}.')
        for name in (UnreadableImageError.__name__, AssertionError.__name__):
            message = message.removeprefix(f'{name}: ')
    else:
        return
    print(f'{parser.prog}: error: {message}', file=sys.stderr)
    raise SystemExit(2)


def load_config(args: argparse.Namespace) -> Config:
    """Read the config and apply the options that both tools have.

    Raises:
        UsageError: If the config, or one that it inherits, is not found.
    """
    path = find_config(args.config)
    try:
        cfg = Config.fromfile(path)
    except (FileNotFoundError, ModuleNotFoundError) as error:
        raise UsageError(f'config {args.config} needs what is not there: {error}') from error
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
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
    """Path of a config file, or of ``<package>::<path>`` among the configs of a package.

    Raises:
        UsageError: If there is no such file or package.
    """
    package, separator, relative = name.partition('::')
    if not separator:
        path = Path(name)
        if not path.is_file():
            raise UsageError(f'config {name} does not exist; recipes lie in configs/')
        return path
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f'config {name}: package {package!r} is not installed; install it first')
    folder = Path(spec.submodule_search_locations[0]) / '.mim' / 'configs'
    if not (folder / relative).is_file():
        raise UsageError(f'config {name} does not exist; configs of {package} lie in {folder}')
    return folder / relative


def check_data(cfg: Config, *names: str) -> None:
    """Check the files of the data loaders ``names``.

    Raises:
        DataError: If some are missing.
    """
    for name in names:
        loader = cfg.get(name)
        if isinstance(loader, Mapping) and 'dataset' in loader:
            check_dataset(loader['dataset'], f'{name}.dataset')


def check_file(path: str, what: str, remedy: str) -> None:
    """Raise :class:`UsageError` if a local file does not exist; URLs pass."""
    if '://' not in path and not os.path.isfile(path):
        raise UsageError(f'{what} {path} does not exist; {remedy}')


def check_pretrained(model: Any, name: str = 'model') -> None:
    """Check that the checkpoints which a model is to start from exist.

    Raises:
        UsageError: If one does not.
    """
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
    """Raise :class:`UsageError` if the config wants mixed precision and there is no GPU."""
    kind = (cfg.get('optim_wrapper') or {}).get('type')
    kind = kind if isinstance(kind, str) else getattr(kind, '__name__', '')
    if kind.rpartition('.')[2] == 'AmpOptimWrapper' and get_device() in ('cpu', 'mps'):
        raise UsageError(
            'mixed precision (optim_wrapper.type=AmpOptimWrapper) needs a GPU and none is '
            'available; train in full precision with --cfg-options optim_wrapper.type=OptimWrapper'
        )


def build_runner(cfg: Config) -> Runner:
    """Build the runner that the config names, or mmengine's."""
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
