"""Starting processes: their codes, their signals, and again in smaller parts without memory."""

import io
import os
import signal
import subprocess
import sys
import time

import pytest
from mmengine.config import Config

from greenmim_mm.cli.pretraining import processes, running
from greenmim_mm.cli.pretraining.folder import RunFolder, make_record
from greenmim_mm.cli.pretraining.plan import Machine, Request, make_plan
from greenmim_mm.cli.pretraining.recipe import dump, make_config
from greenmim_mm.cli.screen import Screen


@pytest.fixture
def program(monkeypatch):
    """``program(code)``: what is run in the place of ``python -m greenmim_mm``."""

    def replace(code):
        popen = subprocess.Popen
        monkeypatch.setattr(
            processes.subprocess,
            'Popen',
            lambda command, **kwargs: popen([sys.executable, '-c', code], **kwargs),
        )

    return replace


def test_processes_know_of_each_other(program, tmp_path):
    names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_PORT', 'GREENMIM_PREPARED')
    program(
        f'import os; open({str(tmp_path)!r} + "/" + os.environ["RANK"], "w")'
        f'.write(" ".join(os.environ[n] for n in {names}))'
    )
    assert processes.start(['pretrain'], 3) == 0
    told = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [entry[:3] for entry in told] == [[str(r), str(r), '3'] for r in range(3)]
    assert len({entry[3] for entry in told}) == 1


def test_the_first_failure_ends_all_and_gives_its_code(program):
    program('import os, sys, time\nif os.environ["RANK"] == "1": sys.exit(75)\ntime.sleep(60)')
    begin = time.monotonic()
    assert processes.start([], 2) == 75
    assert time.monotonic() - begin < 30


def test_signals_are_handed_on_once(program, tmp_path):
    program(
        'import os, signal, sys, time\n'
        'count = []\n'
        'signal.signal(signal.SIGINT, lambda *a: count.append(1))\n'
        f'open({str(tmp_path)!r} + "/" + os.environ["RANK"], "w").close()\n'
        'while not count: time.sleep(0.01)\n'
        'time.sleep(0.5)\n'
        'sys.exit(130 if len(count) == 1 else 1)'
    )

    def interrupt(*_):
        if all((tmp_path / str(rank)).exists() for rank in (0, 1)):
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
    try:
        assert processes.start([], 2) == 130
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ('environment', 'name'),
    [
        ({}, 'none'),
        (dict(RANK='0', WORLD_SIZE='2'), 'pytorch'),
        (dict(SLURM_PROCID='1', SLURM_STEP_NUM_TASKS='4'), 'slurm'),
        # A batch script, which has not called srun.
        (dict(SLURM_PROCID='0', SLURM_NTASKS='4'), 'none'),
    ],
)
def test_launcher(monkeypatch, environment, name):
    for variable in ('RANK', 'WORLD_SIZE', 'SLURM_PROCID', 'SLURM_STEP_NUM_TASKS'):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert processes.launcher() == name


def test_without_memory_steps_are_halved_and_the_run_goes_on(monkeypatch, tmp_path):
    plan = make_plan(
        Request((str(tmp_path),), str(tmp_path), devices=2, batch_size=16),
        100,
        Machine(2, True, 4, 'GPU'),
    )
    folder = RunFolder(tmp_path)
    dump(make_config(plan), folder.config)
    folder.write(make_record(plan, '', []))
    calls = []

    def start(arguments, count):
        calls.append((arguments[-1], Config.fromfile(folder.config).train_cfg.accumulate))
        return running.EXIT_MEMORY if len(calls) < 3 else 0

    monkeypatch.setattr(processes, 'start', start)
    stream = io.StringIO()
    running._train_in_processes(running.Prepared(plan, folder, False), Screen(stream))
    assert calls == [(str(tmp_path), 1), ('--resume', 2), ('--resume', 4)]
    settings = folder.read()['settings']
    assert (settings['accumulate'], settings['batch_size']) == (4, 16)
    assert 'out of memory with 4 images at a time' in stream.getvalue()
