"""The scripts that start several processes, and what they refuse."""

import os
import subprocess

import pytest
import torch
from mmengine.config import Config
from tool_runs import ROOT

from greenmim_mm.cli import runs
from greenmim_mm.cli.errors import UserError


@pytest.mark.parametrize(
    'script, args, expected',
    [
        (
            'dist_train.sh',
            ['config.py', '8', '--resume', '--cfg-options', 'a=b c'],
            '--nproc_per_node=8|tools/train.py|config.py|--launcher|pytorch|--resume|'
            '--cfg-options|a=b c',
        ),
        (
            'dist_test.sh',
            ['config.py', 'last.pth', '4', '--out', 'x.pkl'],
            '--nproc_per_node=4|tools/test.py|config.py|last.pth|--launcher|pytorch|--out|x.pkl',
        ),
        (
            'slurm_train.sh',
            ['gpu', 'job', 'config.py', 'run', '--amp'],
            '--cpus-per-task=8|--kill-on-bad-exit=1|--qos=high|python|-u|tools/train.py|'
            'config.py|--work-dir|run|--launcher|slurm|--amp',
        ),
    ],
)
def test_launchers(script, args, expected, tmp_path):
    """What they call, seen by stand-ins for python and srun."""
    for name in ('python', 'srun'):
        (tmp_path / name).write_text('#!/bin/sh\nfor a; do printf "%s|" "$a"; done\n')
        (tmp_path / name).chmod(0o755)
    env = dict(os.environ, PATH=f'{tmp_path}:{os.environ["PATH"]}', SRUN_ARGS='--qos=high')
    env.pop('PYTHON', None)
    command = [f'tools/{script}', *args]
    result = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(f'|{expected}|'), result.stdout

    result = subprocess.run(command[:2], env=env, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and 'usage: ' in result.stderr


def test_launchers_that_need_gpus(monkeypatch):
    monkeypatch.setattr(runs, 'is_distributed', lambda: False)
    monkeypatch.setattr(runs, 'get_device', lambda: 'cpu')
    with pytest.raises(UserError, match='--launcher slurm needs GPUs.*torchrun'):
        runs.build_runner(Config(dict(launcher='slurm')))
    monkeypatch.setattr(runs, 'get_device', lambda: 'cuda')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setenv('LOCAL_RANK', '2')
    with pytest.raises(UserError, match='process 2 of this machine has no GPU: start 2'):
        runs.build_runner(Config(dict(launcher='pytorch')))
