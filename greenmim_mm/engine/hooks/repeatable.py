"""Runs that repeat, from their start and from any checkpoint."""

import os
from typing import Any

import numpy as np
import torch
from mmengine.dist import barrier, get_rank, get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner

from ...datasets import RepeatableSampler, UnlabelledImages
from ...registry import HOOKS

_STEP = 'images_of_a_step'
_SEED = 'sampler_seed'


class ResumeError(ValueError):
    """A checkpoint is not of this run; the message says what differs, and the remedy."""


@HOOKS.register_module()
class RepeatableRunHook(Hook):
    """Let a run follow from its seed, and a resumed run go on where it stood.

    - Random numbers that the model draws follow from (seed, process, iteration).
    - A checkpoint from the middle of an epoch is followed by the rest of that epoch.
    - Another batch size on resume is refused: the schedule counts iterations.
    - Bad images of an :class:`~greenmim_mm.datasets.UnlabelledImages` are named in
      ``bad_images.txt`` in the work folder, and are still known after a resume.

    What concerns the images needs :class:`~greenmim_mm.datasets.RepeatableSampler` as sampler and
    mmengine's ``EpochBasedTrainLoop``.
    """

    def before_train(self, runner: Runner) -> None:
        """Compare with the run that the checkpoint is of, and leave out what it has done.

        Raises:
            ResumeError: If the batch size or the number of images is another.
        """
        sampler = _sampler(runner.train_dataloader)
        resumed, hub = runner.iter > 0, runner.message_hub
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            _compare(runner, hub.runtime_info.get(_STEP) if resumed else None)
            done = runner.iter - runner.epoch * len(runner.train_dataloader)
            if isinstance(sampler, RepeatableSampler):
                sampler.seed = (
                    hub.runtime_info.get(_SEED, sampler.seed) if resumed else sampler.seed
                )
                hub.update_info(_SEED, sampler.seed)
                sampler.start_at(min(done * _batch_size(runner), len(sampler)))
            elif done:
                runner.logger.warning(
                    f'The checkpoint is from the middle of epoch {runner.epoch + 1}, which starts '
                    'anew: only a greenmim_mm.RepeatableSampler can go on in it.'
                )
            hub.update_info(_STEP, _images_of_a_step(runner))
        self._keep_bad_images(runner, resumed)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Seed what the model draws in this iteration."""
        entropy = (runner.seed or 0, get_rank(), runner.iter)
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))

    def _keep_bad_images(self, runner: Runner, resumed: bool) -> None:
        dataset = runner.train_dataloader.dataset
        while not isinstance(dataset, UnlabelledImages):
            dataset = getattr(dataset, 'dataset', None)
            if dataset is None:
                return
        path = os.path.join(runner.work_dir, 'bad_images.txt')
        if is_main_process() and not resumed and os.path.exists(path):
            os.remove(path)
        barrier()
        # Before workers are started, which then have it as well.
        dataset.bad_images.keep_in(path)


def _compare(runner: Runner, before: int | None) -> None:
    """Refuse a checkpoint whose iterations are not those of this run."""
    now, processes = _images_of_a_step(runner), get_world_size()
    if before is not None and before != now:
        raise ResumeError(
            f'the checkpoint is of a run with {before} images in a step, this one has {now}: '
            f'resume with train_dataloader.batch_size={before / processes:g} (on {processes} '
            'processes), or start anew from its weights with load_from=PATH and without --resume'
        )
    length = len(runner.train_dataloader)
    done = runner.iter - runner.epoch * length
    if not 0 <= done <= length:
        raise ResumeError(
            f'the checkpoint stands at iteration {runner.iter} in epoch {runner.epoch + 1}, but '
            f'{length} iterations make an epoch of this run: resume with the images and the '
            'train_dataloader.batch_size of before, or start anew from its weights with '
            'load_from=PATH and without --resume'
        )


def _images_of_a_step(runner: Runner) -> int:
    return _batch_size(runner) * get_world_size()


def _batch_size(runner: Runner) -> int:
    loader = runner.train_dataloader
    return loader.batch_size or getattr(loader.batch_sampler, 'batch_size', 0)


def _sampler(loader: Any) -> Any:
    return getattr(loader.batch_sampler, 'sampler', loader.sampler)
