"""tools/train.py in processes of its own, which get signals, die and go on."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tool_runs import ROOT, losses, run_tool

from greenmim_mm.cli import runs


def test_command_line_with_workers_and_damaged_images(small_config, images, tmp_path):
    """The names survive the way out of a worker process."""
    data, run = tmp_path / 'data', tmp_path / 'run'
    data.mkdir()
    for name in 'abcd':
        (data / f'{name}.jpg').write_bytes((images / 'a.jpg').read_bytes())
    (data / 'bad.jpg').touch()
    (data / 'cut.jpg').write_bytes((images / 'a.jpg').read_bytes()[:-400])
    args = (
        *(small_config, f'--work-dir={run}', '--cfg-options'),
        *(f'train_dataloader.dataset.data_root={data}', 'train_dataloader.num_workers=1'),
    )
    result = run_tool('train', *args, 'train_cfg.max_epochs=1')
    assert result.returncode == 0, result.stderr
    assert len(losses(run)) == 3  # others stand in
    lines = (run / 'bad_images.txt').read_text().splitlines()
    assert sorted(line.split('\t')[0] for line in lines) == [
        str(data / 'bad.jpg'),
        str(data / 'cut.jpg'),
    ]
    result = run_tool('train', *args, 'train_dataloader.dataset.max_bad=1')
    assert result.returncode == 2, result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert 'error: 2 of 6 images cannot be used, more than the 1' in line
    assert str(data / 'bad.jpg') in line and str(run / 'bad_images.txt') in line
    assert 'Traceback' not in result.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def environment() -> dict[str, str]:
    """That of processes on a machine without GPUs, each with a thread, as torch wants it."""
    return os.environ | dict(
        PYTHON=sys.executable,
        MASTER_PORT=str(free_port()),
        CUDA_VISIBLE_DEVICES='',
        OMP_NUM_THREADS='1',
    )


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    return [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


def launch(config: Path, work_dir: Path, count: int) -> tuple[subprocess.Popen, Path]:
    """Start a long run in ``count`` processes; also the file of what they say."""
    log = work_dir.with_suffix('.log')
    command = ['bash', ROOT / 'tools/dist_train.sh', config, str(count)]
    command += [f'--work-dir={work_dir}', '--cfg-options', 'train_cfg.max_epochs=100']
    with open(log, 'wb') as file:
        return subprocess.Popen(command, env=environment(), stdout=file, stderr=file), log


@pytest.fixture(scope='module')
def killed(tmp_path_factory):
    """tools/analysis/stress_interruption.py, its config, and a run that was left alone."""
    path = ROOT / 'tools/analysis/stress_interruption.py'
    spec = importlib.util.spec_from_file_location('stress_interruption', path)
    stress = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stress)
    folder = tmp_path_factory.mktemp('killed')
    config = stress.make_config(folder)
    stress.finish(config, folder / 'whole')
    return stress, config, folder


def test_killed_twice(killed):
    """kill -9 in the middle of an epoch, twice, each time with what --resume makes of it."""
    stress, config, folder = killed
    work_dir = folder / 'killed'
    for iteration in (5, stress.STEPS + 5):
        process = stress.start(config, work_dir)
        assert stress.wait_for(work_dir, iteration, process)
        stress.kill(process)
        assert max(stress.losses(work_dir)) < stress.EPOCHS * stress.STEPS
    stress.finish(config, work_dir)
    stress.compare(folder / 'whole', work_dir)
    # Some iterations were run twice, with the same loss.
    assert any(len(values) > 1 for values in stress.losses(work_dir).values())


def test_terminated_with_its_workers(killed):
    """A scheduler signals every process of a job, workers of the loader as well."""
    stress, config, folder = killed
    work_dir = folder / 'terminated'
    process = stress.start(config, work_dir)
    assert stress.wait_for(work_dir, 4, process)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    log = work_dir.with_suffix('.log').read_text()
    assert 'Traceback' not in log
    last = log.strip().splitlines()[-1]
    assert last.startswith('train.py: SIGTERM after iteration ') and '--resume' in last
    stress.finish(config, work_dir)
    stress.compare(folder / 'whole', work_dir)
    assert all(len(values) == 1 for values in stress.losses(work_dir).values())


def test_one_of_two_processes_is_terminated(killed):
    """All agree: the run ends after one and the same iteration, saved once, and can go on."""
    stress, config, folder = killed
    work_dir = folder / 'two'
    launcher, log = launch(config, work_dir, 2)
    assert stress.wait_for(work_dir, 3, launcher)
    second = children(launcher.pid)[1]
    assert b'LOCAL_RANK=1' in Path(f'/proc/{second}/environ').read_bytes()
    os.kill(second, signal.SIGTERM)
    assert launcher.wait(timeout=120) != 0
    last = max(stress.losses(work_dir))
    (saved,) = work_dir.glob('interrupted_iter_*.pth')
    assert saved.stem == f'interrupted_iter_{last}'
    assert log.read_text().count(f'SIGTERM after iteration {last} of') == 1
    assert runs.last_checkpoint(work_dir) == saved


def test_processes_without_gpus(small_config, images, tmp_path):
    """Three processes meet by gloo, train one model on data that no three share, and end alike."""
    data = tmp_path / 'data'
    shutil.copytree(images, data)
    # 4 images in batches of 2 for 3 processes, and of one that is bad another takes the place.
    (data / 'a.jpg').write_bytes(b'')
    result = subprocess.run(
        [
            *('bash', ROOT / 'tools/dist_train.sh', small_config, '3'),
            *(f'--work-dir={tmp_path / "run"}', '--cfg-options', 'train_cfg.max_epochs=2'),
            f'train_dataloader.dataset.data_root={data}',
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert len(losses(tmp_path / 'run')) == 2
    assert (tmp_path / 'run' / 'epoch_2.pth').exists()
    (line,) = (tmp_path / 'run' / 'bad_images.txt').read_text().splitlines()
    assert line.startswith(f'{data / "a.jpg"}\t')


def test_one_of_three_processes_dies(killed):
    """The job ends within a minute, says which process it was and of what, and can go on."""
    stress, config, folder = killed
    work_dir = folder / 'three'
    launcher, log = launch(config, work_dir, 3)
    assert stress.wait_for(work_dir, 4, launcher)
    members = children(launcher.pid)
    (victim,) = (
        pid for pid in members if b'LOCAL_RANK=2' in Path(f'/proc/{pid}/environ').read_bytes()
    )
    start = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    assert launcher.wait(timeout=120) != 0
    assert time.monotonic() - start < 60
    assert not [pid for pid in members if Path(f'/proc/{pid}').exists()]
    text = log.read_text()
    assert 'SIGKILL' in text and f'pid: {victim}' in text and 'local_rank: 2' in text
    assert runs.last_checkpoint(work_dir) is not None
