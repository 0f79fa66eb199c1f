"""Checkpoints that are written whole or not at all."""

import os
import shutil
from collections import deque
from pathlib import Path
from typing import Any

from mmengine.dist import barrier, is_main_process
from mmengine.hooks import CheckpointHook as _CheckpointHook
from mmengine.runner import Runner

from ...registry import HOOKS
from ..checkpoints import LAST, CheckpointError

_INTERRUPTED = 'interrupted_checkpoint'


@HOOKS.register_module()
class CheckpointHook(_CheckpointHook):
    """mmengine's hook, which a power cut, a full disk or ``kill -9`` cannot rob of a checkpoint.

    A checkpoint is written under another name, brought to the disk and then renamed, and
    ``last_checkpoint`` follows; only then are older ones removed. mmengine removes first and
    writes in place. Storage that is not local is left to mmengine.

    Args:
        *args: The parent's.
        folder: Folder inside the work folder for the checkpoints; the work folder itself if empty.
            (The parent's ``out_dir`` lies anywhere, and gets a folder named as the work folder.)
        **kwargs: The parent's.
    """

    def __init__(self, *args: Any, folder: str = '', **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.folder = folder

    def before_train(self, runner: Runner) -> None:
        """Clear away what an earlier run has left half-written."""
        super().before_train(runner)
        if self.folder:
            self.out_dir = os.path.join(runner.work_dir, self.folder)
        if is_main_process() and self._is_local():
            os.makedirs(self.out_dir, exist_ok=True)
            for path in Path(self.out_dir).glob('.*.part'):
                _remove(path)
        if self._is_local():
            # mmengine keeps whole paths and removes what is no longer best: in a folder that was
            # copied that would be a checkpoint of the first one.
            if getattr(self, 'best_ckpt_path', None):
                self.best_ckpt_path = self._here(self.best_ckpt_path)
            if named := getattr(self, 'best_ckpt_path_dict', None):
                self.best_ckpt_path_dict = {k: v and self._here(v) for k, v in named.items()}

    def save_interrupted(self, runner: Runner) -> str:
        """Save a checkpoint after an iteration, which the next regular one replaces.

        Args:
            runner: The runner, in ``after_train_iter``.

        Returns:
            Its path.

        Raises:
            CheckpointError: If it cannot be written.
        """
        name = f'interrupted_iter_{runner.iter + 1}.pth'
        outdated = runner.message_hub.runtime_info.get(_INTERRUPTED)
        runner.message_hub.update_info(_INTERRUPTED, name)
        meta = dict(epoch=runner.epoch, iter=runner.iter + 1)
        path = self._write(runner, name, meta, by_epoch=False)
        if outdated and is_main_process():
            _remove(Path(self.out_dir, outdated))
        return path

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        if not self._is_local():
            super()._save_checkpoint_with_step(runner, step, meta)
            return
        interrupted = runner.message_hub.pop_info(_INTERRUPTED)
        outdated = [interrupted] if interrupted else []
        if self.max_keep_ckpts > 0:
            kept = [other for other in self.keep_ckpt_ids if other != step] + [step]
            cut = max(len(kept) - self.max_keep_ckpts, 0)
            outdated += [self.filename_tmpl.format(other) for other in kept[:cut]]
            self.keep_ckpt_ids = deque(kept[cut:], self.max_keep_ckpts)
            runner.message_hub.update_info('keep_ckpt_ids', kept[cut:])
        name = self.filename_tmpl.format(step)
        self.last_ckpt = os.path.join(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        self._write(runner, name, meta, by_epoch=self.by_epoch)
        if is_main_process():
            for other in outdated:
                _remove(Path(self.out_dir, other))

    def _here(self, path: str) -> str:
        return os.path.join(self.out_dir, os.path.basename(path))

    def _is_local(self) -> bool:
        named = self.file_client_args or self.backend_args or '://' in str(self.out_dir)
        return not named

    def _write(self, runner: Runner, name: str, meta: dict, by_epoch: bool) -> str:
        final, part = Path(self.out_dir, name), Path(self.out_dir, f'.{name}.part')
        try:
            runner.save_checkpoint(
                self.out_dir,
                part.name,
                save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler,
                meta=meta,
                by_epoch=by_epoch,
                **self.args,
            )
            # All of them have written their part of a folder.
            barrier()
            if is_main_process():
                _sync(part)
                if final.is_dir():
                    # A folder takes the place of none.
                    _remove(final)
                os.replace(part, final)
                _name_last(Path(runner.work_dir), final)
        except OSError as error:
            if is_main_process():
                _remove(part)
            last = Path(runner.work_dir, LAST)
            whole = last.read_text().strip() if last.is_file() else ''
            raise CheckpointError(
                f'checkpoint {final} cannot be written: {error.strerror or error}; make room '
                + (f'and go on with --resume: {whole} is whole' if whole else 'and start again')
            ) from error
        return str(final)


def _name_last(work_dir: Path, path: Path) -> None:
    """Let ``last_checkpoint`` name a checkpoint, at once."""
    part = work_dir / f'.{LAST}.part'
    part.write_text(str(path))
    _sync(part)
    os.replace(part, work_dir / LAST)
    _sync(work_dir)


def _sync(path: Path) -> None:
    """Bring a file, or all below a folder, to the disk: a name must not be there before it."""
    for place in [*path.rglob('*'), path] if path.is_dir() and path.suffix == '.part' else [path]:
        handle = os.open(place, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
