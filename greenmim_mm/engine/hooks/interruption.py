"""Signals that end a run after the iteration at hand, with a checkpoint."""

import atexit
import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from multiprocessing.sharedctypes import RawValue
from types import FrameType
from typing import Any

import torch
from mmengine.dist import all_reduce, barrier, is_distributed
from mmengine.hooks import Hook
from mmengine.runner import BaseLoop, Runner

from ...registry import HOOKS
from .checkpoint import CheckpointHook

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Interruption(Exception):
    """A signal has ended a run; all that was done is saved.

    Attributes:
        code: Exit code of the program: 128 and the signal's number.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@HOOKS.register_module()
class InterruptionHook(Hook):
    """On SIGTERM, SIGUSR1 (a scheduler's warning) or Ctrl-C, save a checkpoint and end the run.

    It ends after the next update of the parameters, in all processes alike, whichever of them got
    the signal. A second Ctrl-C ends it at once. Workers of data loaders, which a terminal and
    schedulers signal as well, work on.
    """

    # After the hooks that belong to the iteration.
    priority = 'LOWEST'

    def __init__(self) -> None:
        self._signal = 0
        self._before: dict[int, object] = {}
        # Seen by workers; without a lock, which a handler of signals must not wait for.
        self._leaving = RawValue('b', 0)

    def before_run(self, runner: Runner) -> None:
        """See to it that signals are as before when the training ends, whatever ends it."""
        # Not runner.train_loop, which would build one for a test.
        if not isinstance(loop := runner._train_loop, BaseLoop):
            return
        run = loop.run

        def run_and_stop() -> Any:
            try:
                return run()
            finally:
                # Exceptions come past after_train.
                self._stop()

        loop.run = run_and_stop

    def before_train(self, runner: Runner) -> None:
        """Listen."""
        self._signal = self._leaving.value = 0
        loader = runner.train_dataloader
        loader.worker_init_fn = partial(_init_worker, loader.worker_init_fn, self._leaving)
        atexit.register(self._leave)
        # Elsewhere Python does not let signals be handled.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}

    def after_train(self, runner: Runner) -> None:
        """Listen no more."""
        self._stop()

    def _stop(self) -> None:
        self._leave()
        atexit.unregister(self._leave)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: object = None
    ) -> None:
        """Save and end the run if a signal has come.

        Raises:
            Interruption: If so.
        """
        number = self._agreed()
        # Gradients that are still being added up are in no checkpoint.
        if not number or (runner.iter + 1) % _accumulated(runner) != 0:
            return
        self._stop()
        path = self._save(runner)
        barrier()
        name = signal.Signals(number).name
        raise Interruption(
            f'{name} after iteration {runner.iter + 1} of {runner.max_iters}'
            + (f'; saved {path}; go on with the same command and --resume' if path else ''),
            128 + number,
        )

    def _save(self, runner: Runner) -> str:
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook):
                return hook.save_interrupted(runner)
        return ''

    def _agreed(self) -> int:
        """The signal that any process got; 0 if none did."""
        if not is_distributed():
            return self._signal
        flag = torch.tensor(self._signal)
        all_reduce(flag, 'max')
        return int(flag)

    def _leave(self) -> None:
        self._leaving.value = 1

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number


def _init_worker(init: Callable[[int], None] | None, leaving: Any, worker_id: int) -> None:
    """Let a worker work on: without images the run could not end as it should.

    PyTorch's own handler, which is there by now, would end it.
    """
    for number in _SIGNALS:
        signal.signal(number, partial(_pass_over, leaving))
    if init is not None:
        init(worker_id)


def _pass_over(leaving: Any, number: int, frame: FrameType | None) -> None:
    # The parent ends its workers by SIGTERM when it leaves, and waits for them.
    if number == signal.SIGTERM and leaving.value:
        os._exit(0)


def _accumulated(runner: Runner) -> int:
    return getattr(runner.optim_wrapper, '_accumulative_counts', 1)
