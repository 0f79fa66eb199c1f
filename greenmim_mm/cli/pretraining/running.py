"""A pre-training from the command to the exported weights."""

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from logging import FileHandler
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import barrier, broadcast_object_list, init_dist, is_distributed
from mmengine.logging import MMLogger
from mmengine.runner import Runner

from ...checkpoint import convert_file, inspect_checkpoint
from ...datasets import DataError, find_images
from ...datasets.listing import EXTENSIONS
from ...engine.checkpoints import last_checkpoint
from ...engine.hooks import Interruption
from ...engine.loops import OutOfMemoryError
from ...evaluation import backbone_config
from .. import runs
from ..errors import UserError
from ..exporting import Exports, export, tell
from ..screen import Screen
from . import processes
from .folder import (
    RunFolder,
    check_folder,
    check_room,
    hash_of,
    make_record,
    resumed_record,
    resumed_request,
)
from .hooks import PicturesHook, ProgressHook, sample_images
from .plan import Machine, Plan, Request, Start, make_plan
from .recipe import dump, make_config

EXIT_MEMORY = 75
"""Exit code of a process of several that is out of memory: to be started again, in more parts."""


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start.

    Attributes:
        plan: Its settings.
        folder: Its files.
        resume: Whether it goes on.
    """

    plan: Plan
    folder: RunFolder
    resume: bool


class _QuietRunner(Runner):
    """mmengine's runner that writes into the run's folder alone: one log, and no other files."""

    def build_logger(self, log_level: int | str = 'INFO', **kwargs: Any) -> MMLogger:
        """The log file, and nothing on the screen."""
        with suppress(OSError):  # another process was faster
            os.rmdir(self._log_dir)
        self._log_dir = self.work_dir
        logger = super().build_logger(log_level, str(RunFolder(Path(self.work_dir)).log), **kwargs)
        logger.handlers = [h for h in logger.handlers if isinstance(h, FileHandler)]
        return logger

    def dump_config(self) -> None:
        """Nothing: the run's folder has it."""


def pretrain(
    request: Request,
    given: Iterable[str],
    command: Sequence[str],
    screen: Screen,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Exports | None:
    """Prepare and do a run, in one process or several.

    Args:
        request: What is asked for.
        given: Names of settings that were named, for ``resume``.
        command: The command line, for the record.
        screen: What people see.
        resume: Go on with the run in ``request.out``.
        overwrite: Start anew in a folder that holds a run.
        dry_run: Say what would be done.

    Returns:
        What was exported; None in processes that export nothing, and of a dry run.

    Raises:
        UserError, DataError, CheckpointError: What the user can mend.
        Interruption: After a signal; all is saved and exported.
        SystemExit: With the code of a process of several that has failed and said why.
    """
    joined = processes.launcher()
    if processes.is_prepared():
        processes.end_with_parent()
        folder = RunFolder(Path(request.out))
        prepared = Prepared(Plan.from_dict(folder.read()['settings']), folder, resume)
        return _train(prepared, screen, joined)
    if joined != 'none':
        prepared = _prepare_together(
            joined, request, given, command, screen, resume, overwrite, dry_run
        )
        return _train(prepared, screen, joined) if prepared else None
    prepared = prepare(request, given, command, screen, resume, overwrite, dry_run)
    if prepared is None:
        return None
    if prepared.plan.devices == 1:
        return _train(prepared, screen, joined)
    return _train_in_processes(prepared, screen)


def prepare(
    request: Request,
    given: Iterable[str],
    command: Sequence[str],
    screen: Screen,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Prepared | None:
    """Check everything, choose the settings, and write ``config.py`` and ``run.json``.

    Returns:
        The run; None of a dry run.
    """
    folder, record, before = RunFolder(Path(request.out)), {}, None
    if resume:
        record = folder.read()
        before = Plan.from_dict(record['settings'])
        request = resumed_request(request, given, before)
    elif not request.data:
        raise UserError('no data: name folders of images, image files or lists (.txt)')
    if not dry_run:
        check_folder(folder.root, resume, overwrite, request.data)
    if request.tensorboard and find_spec('tensorboard') is None:
        raise UserError('--tensorboard needs the package tensorboard: pip install tensorboard')

    named = request.data
    # A run may go on from another folder.
    data = tuple(os.path.abspath(os.path.expanduser(path)) for path in named)
    request = replace(request, data=data)
    paths = _count(request.data, screen)
    digest = hash_of(paths)
    if resume and digest != record['data']['sha256_of_names_and_sizes']:
        raise UserError(
            f'--resume goes on as before, and the images are others: {record["data"]["images"]} '
            f'then, {len(paths)} now, or other names or sizes; bring them back, or start anew from '
            f'the weights in another folder with --init {request.out}/exported/timm.safetensors'
        )
    start = None
    if request.init and not resume:
        start = _inspect_start(request.init)
    plan = make_plan(request, len(paths), _machine(processes.launcher()), start)
    if before is not None:
        # What was chosen then is not "as you said" now.
        plan = replace(plan, windows=before.windows, reasons=before.reasons)
    cfg = make_config(plan)
    screen.say(f'found {len(paths):,} images in {", ".join(named)}')
    screen.say('the plan' + (' goes on:' if resume else ':'))
    for line in plan.describe():
        screen.say(line)
    if dry_run:
        screen.say('nothing was done (--dry-run)')
        return None
    if overwrite:
        folder.clear()
    if plan.init:
        for part, settings in _start_settings(plan, folder, resume).items():
            cfg.model[part].update(settings)
    dump(cfg, folder.config)
    folder.write(
        resumed_record(record, plan, command) if resume else make_record(plan, digest, command)
    )
    screen.say(f'all of it goes to {folder.root}, what libraries say to {folder.log}')
    return Prepared(plan, folder, resume)


def _count(data: Sequence[str], screen: Screen) -> list[str]:
    paths: list[str] = []
    for path in find_images(data):
        paths.append(path)
        if len(paths) % 100 == 0 and screen.terminal:
            screen.status(f'counting images: {len(paths):,}')
    if not paths:
        raise DataError(
            f'no images found in {", ".join(data)}; looked for {", ".join(EXTENSIONS)}, in '
            'sub-folders, too'
        )
    return paths


def _machine(launcher: str) -> Machine:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if launcher != 'none' and gpus:
        # As many processes as were started, on however many machines.
        gpus = _world_size()
    bf16 = bool(gpus) and torch.cuda.is_bf16_supported()
    name = torch.cuda.get_device_name(0) if gpus else ''
    return Machine(gpus, bf16, len(os.sched_getaffinity(0)), name)


def _world_size() -> int:
    return int(os.environ.get('WORLD_SIZE', os.environ.get('SLURM_STEP_NUM_TASKS', 1)))


def _inspect_start(path: str) -> Start:
    try:
        found = inspect_checkpoint(path).architecture
    except (OSError, ValueError) as error:
        raise UserError(f'--init: {error}') from error
    version = 'swin' if found.version == 1 else 'swinv2'
    return Start(found.name and f'{version}-{found.name}', found.window_sizes)


def _start_settings(plan: Plan, folder: RunFolder, resume: bool) -> dict[str, dict[str, Any]]:
    """Bring the weights to start from into the folder; settings of the model that load them."""
    if not resume:
        told = backbone_config(plan.init, plan.windows)
        scale = told.get('pretrained_window_sizes')
        convert_file(
            plan.init,
            folder.init,
            'greenmim_mm',
            force=True,
            strict=False,
            # Bias tables of a Swin V1 are resized while they are loaded.
            window_size=None if scale is None else plan.windows,
            pretrained_window_size=scale,
        )
    checkpoint = os.path.abspath(folder.init)
    found = inspect_checkpoint(folder.init)
    backbone: dict[str, Any] = dict(init_cfg=dict(type='Pretrained', checkpoint=checkpoint))
    if plan.version == 2:
        backbone['pretrained_window_sizes'] = found.architecture.pretrained_window_sizes
    if found.kind != 'GreenMIM pre-training':
        return dict(backbone=backbone)
    # Its decoder as well.
    neck = dict(init_cfg=dict(type='Pretrained', checkpoint=checkpoint, prefix='neck.'))
    return dict(backbone=backbone, neck=neck)


def _prepare_together(launcher: str, *arguments: Any) -> Prepared | None:
    """Let the first process of a launcher prepare the run, and tell the others."""
    if torch.cuda.is_available():
        runs.check_gpu_of_process(launcher)
        init_dist(launcher)
    else:
        runs.join_without_gpu(launcher)
    request, given, command, screen, *flags = arguments
    told: list[Any] = [None, '']
    if processes.rank() == 0:
        try:
            if request.devices not in (None, _world_size()):
                raise UserError(
                    f'--devices {request.devices}: the launcher has started {_world_size()}; leave '
                    'the option out'
                )
            request = replace(request, devices=_world_size())
            told[0] = prepare(request, {*given, 'devices'}, command, screen, *flags)
        except BaseException as error:
            told[1] = str(error) or type(error).__name__
            broadcast_object_list(told)
            raise
    broadcast_object_list(told)
    if told[1]:
        # The first has said why.
        raise SystemExit(2)
    return told[0]


def _train_in_processes(prepared: Prepared, screen: Screen) -> Exports | None:
    folder, resume = prepared.folder, prepared.resume
    while True:
        arguments = ['pretrain', '--out', str(folder.root), *['--resume'] * resume]
        code = processes.start(arguments, prepared.plan.devices)
        plan = prepared.plan
        if code != EXIT_MEMORY:
            break
        # Halve, keep the step's batch, and go on from what there is.
        parts = min(2 * plan.accumulate, plan.device_batch)
        screen.say(
            f'out of memory with {plan.device_batch // plan.accumulate} images at a time: each '
            f'device computes its share of a step in {parts} parts from now on'
        )
        prepared = replace(prepared, plan=replace(plan, accumulate=parts))
        folder.write(folder.read() | dict(settings=prepared.plan.to_dict()))
        cfg = Config.fromfile(folder.config)
        cfg.train_cfg.accumulate = parts
        dump(cfg, folder.config)
        resume = True
    if code:
        raise SystemExit(code)
    return None


def _train(prepared: Prepared, screen: Screen, launcher: str) -> Exports | None:
    """Train in this process, and export if it is the first."""
    plan, folder = prepared.plan, prepared.folder
    first = processes.rank() == 0
    screen.quiet = screen.quiet or not first
    try:
        try:
            with _output_in(folder.log):
                _run(prepared, screen, launcher)
        except Interruption as error:
            screen.end_status()
            screen.say(str(error).partition(';')[0])
            exports = _export(plan, folder, screen) if first else None
            _wait_for_first()
            raise Interruption(_how_to_go_on(folder), error.code) from error
        except OutOfMemoryError as error:
            screen.end_status()
            if processes.is_prepared() and error.accumulate < plan.device_batch:
                raise SystemExit(EXIT_MEMORY) from error
            raise UserError(str(error)) from error
        exports = _export(plan, folder, screen) if first else None
        _wait_for_first()
        if exports:
            tell(exports, screen)
        return exports
    finally:
        screen.end_status()


def _how_to_go_on(folder: RunFolder) -> str:
    return f'interrupted; go on with: greenmim pretrain --out {folder.root} --resume'


def _run(prepared: Prepared, screen: Screen, launcher: str) -> None:
    plan, folder = prepared.plan, prepared.folder
    cfg = Config.fromfile(folder.config)
    # Paths of a folder that has been moved.
    cfg.work_dir, cfg.launcher = str(folder.root), launcher
    cfg.visualizer.vis_backends = []
    if plan.tensorboard:
        board = dict(type='TensorboardVisBackend', save_dir=str(folder.root / 'tensorboard'))
        cfg.visualizer.vis_backends = [board]
    if prepared.resume and (last := last_checkpoint(folder.root)) is not None:
        cfg.resume, cfg.load_from = True, str(last)
        if told := runs.finished(cfg):
            screen.say(told.partition(';')[0])
            return
        screen.say(f'going on from {last}')
    runs.check_training(cfg)
    runner = runs.build_runner(cfg, _QuietRunner)
    if not prepared.resume:
        check_room(folder.root, sum(p.numel() for p in runner.model.parameters()))
    runner.register_hook(ProgressHook(screen, folder.metrics))
    if processes.rank() == 0:
        images = sample_images(list(find_images(plan.data)), plan.image_size)
        runner.register_hook(PicturesHook(images, folder.pictures, folder.metrics, plan.seed))
    runner.train()
    if processes.rank() == 0:
        _tell_bad_images(folder, screen)


def _tell_bad_images(folder: RunFolder, screen: Screen) -> None:
    folder.bad_images.touch()
    if count := len(folder.bad_images.read_bytes().splitlines()):
        screen.say(f'{count} images could not be used: {folder.bad_images} names them')


@contextmanager
def _output_in(log: Path) -> Iterator[None]:
    """Send what libraries print into the log, warnings included."""
    # Not closed: loggers that are made meanwhile keep it.
    stream = open(log, 'a', encoding='utf-8', buffering=1)  # noqa: SIM115
    with redirect_stdout(stream), redirect_stderr(stream), warnings.catch_warnings():
        yield


def _wait_for_first() -> None:
    """Launchers end all processes as soon as one has ended with an error."""
    if is_distributed():
        barrier()


def _export(plan: Plan, folder: RunFolder, screen: Screen) -> Exports | None:
    if not plan.export:
        return None
    with _output_in(folder.log):
        return export(folder.root, folder.exported, plan.export, force=True, say=screen.say)
