"""Several processes of a run: started here, or joined where a launcher has started them."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

# Says to a process that its parent has prepared the run.
_PREPARED = 'GREENMIM_PREPARED'
_PARENT = 'GREENMIM_PARENT_PIPE'
_PACKAGE = Path(__file__).resolve().parents[3]
# A process that failed leaves the others waiting for it; those that save need some time.
_GRACE = 60.0


def launcher() -> str:
    """What started this process beside others: 'none', 'pytorch' (also torchrun) or 'slurm'."""
    if 'RANK' in os.environ and 'WORLD_SIZE' in os.environ:
        return 'pytorch'
    # Set by srun alone: a batch script has SLURM_PROCID, too.
    if int(os.environ.get('SLURM_STEP_NUM_TASKS', 1)) > 1 and 'SLURM_PROCID' in os.environ:
        return 'slurm'
    return 'none'


def is_prepared() -> bool:
    """Whether :func:`start` of another process has started this one."""
    return _PREPARED in os.environ


def rank() -> int:
    """Number of this process among all."""
    return int(os.environ.get('RANK', os.environ.get('SLURM_PROCID', 0)))


def start(arguments: Sequence[str], count: int) -> int:
    """Run ``python -m greenmim_mm ARGUMENTS`` in some processes that know of each other.

    Signals that end a program are handed to all of them once. (torchrun ends its processes half a
    minute later, and a terminal's Ctrl-C reaches them twice, so that none could save.)

    Args:
        arguments: Of the command.
        count: How many.

    Returns:
        0 if all have ended well, else the exit code of the first that has not.
    """
    reading, writing = os.pipe()
    environment = dict(
        os.environ,
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(_free_port()),
        PYTHONPATH=os.pathsep.join(
            [str(_PACKAGE), *filter(None, [os.environ.get('PYTHONPATH', '')])]
        ),
    )
    environment[_PREPARED] = '1'
    environment[_PARENT] = str(reading)
    # Else each process takes all cores for itself.
    environment.setdefault('OMP_NUM_THREADS', '1')
    started: list[subprocess.Popen] = []

    def forward(number: int, _frame: object) -> None:
        for process in started:
            if process.poll() is None:
                process.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, forward) for number in numbers}
    try:
        for number in range(count):
            started.append(
                subprocess.Popen(
                    [sys.executable, '-m', 'greenmim_mm', *arguments],
                    env=environment | dict(RANK=str(number), LOCAL_RANK=str(number)),
                    stdin=subprocess.DEVNULL,
                    pass_fds=[reading],
                    # A terminal's signals come through this process alone.
                    start_new_session=True,
                )
            )
        os.close(reading)
        return _wait(started)
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
        os.close(writing)
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent() -> None:
    """End this process, as on SIGTERM, when the one that started it is gone."""
    if _PARENT not in os.environ:
        return
    pipe = int(os.environ.pop(_PARENT))

    def watch() -> None:
        # Nothing is ever written: it returns when the other end is closed.
        os.read(pipe, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _wait(processes: Sequence[subprocess.Popen]) -> int:
    """Wait for all; where one has failed, end the others if they do not end by themselves."""
    failed, deadline = 0, float('inf')
    while running := [process for process in processes if process.poll() is None]:
        codes = [process.returncode for process in processes if process.returncode]
        if codes and not failed:
            failed, deadline = codes[0], time.monotonic() + _GRACE
            if not 128 < failed < 160:  # no signal that all have got
                deadline = time.monotonic() + 2
        if time.monotonic() > deadline:
            for process in running:
                process.kill()
        time.sleep(0.05)
    codes = [process.returncode for process in processes if process.returncode]
    # Of those that were killed because of another, that one's.
    return failed or (codes[0] if codes else 0)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]
