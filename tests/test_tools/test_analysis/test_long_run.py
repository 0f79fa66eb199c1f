"""tools/analysis/long_run.py: growth is noticed; a process and its children are sampled."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[3] / 'tools/analysis/long_run.py'


def load_tool():
    spec = importlib.util.spec_from_file_location('long_run', PATH)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up while they are made.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


tool = load_tool()


def run(**growth):
    """Samples of 400 steps, of which some value grows by the step."""
    start = dict(memory=500 << 20, files=40, threads=9)
    return [
        tool.Sample(
            step=step,
            seconds=0.1 * step + growth.get('seconds', 0) * step**2,
            **{name: int(v + growth.get(name, 0) * step) for name, v in start.items()},
        )
        for step in range(10, 401, 10)
    ]


@pytest.mark.parametrize(
    'growth, message',
    [
        (dict(memory=1 << 18), 'memory: from'),
        (dict(files=0.02), 'open files: from'),
        (dict(threads=0.02), 'threads: from'),
        (dict(seconds=1e-4), 'a step: from'),
        ({}, None),
        (dict(memory=1 << 14, files=0.002, seconds=1e-5), None),
    ],
)
def test_growth(growth, message):
    found = tool.growth(run(**growth))
    assert (len(found) == 1 and message in found[0]) if message else found == []
    assert tool.describe(run(**growth)).startswith('400 steps: memory 5')


def test_moments_do_not_count():
    samples = run()
    samples[35] = tool.Sample(360, 4 << 30, 500, 90, samples[35].seconds)
    assert tool.growth(samples) == []
    with pytest.raises(ValueError, match='too few'):
        tool.growth(samples[:6])


def test_a_process_is_sampled_with_its_children():
    code = 'import subprocess, sys; subprocess.run([sys.executable, "-c", "input()"])'
    process = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE)
    try:
        while len(tool.family(process.pid)) < 2:
            pass
        one = tool.sample(process.pid, 3)
        assert one.step == 3 and one.memory > 5 << 20 and one.files >= 6 and one.threads >= 2
    finally:
        process.communicate(b'\n')
    assert tool.sample(process.pid, 3) is None
    assert os.getpid() in tool.family(os.getpid())
