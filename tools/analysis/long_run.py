"""Trains for long, and looks whether memory, file handles, threads or time for a step grow.

The demo's pre-training and its detector run as commands on images of the demo. From outside, each
half second, the process and its workers are sampled: resident memory, open files, threads, and
processor seconds. The second quarter of a run (the first one fills caches) is compared with the
last one: memory may grow by 5 % or 32 MB, files and threads by 2, processor seconds for a step by
15 %. Processor seconds count the work alone, whatever else the machine does.

Example:
    python tools/analysis/long_run.py --pretrain 3000 --detect 500
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
NAMES = dict(
    pretrain='greenmim_swin-mini-w4_1xb16-coslr_digits-128px',
    detect='mask-rcnn_swin-mini-w4_fpn_digits-128px',
)
# Images and images in a step; few images make many epochs, at whose ends a checkpoint is written.
IMAGES, BATCH = dict(pretrain=800, detect=160), dict(pretrain=16, detect=8)
MEMORY, MEMORY_SHARE, HANDLES, TIME_SHARE = 32 << 20, 0.05, 2, 0.15
TICKS, PAGE = os.sysconf('SC_CLK_TCK'), os.sysconf('SC_PAGE_SIZE')


@dataclass(frozen=True)
class Sample:
    """What a run takes at a moment, its workers included.

    Attributes:
        step: Steps that are done.
        memory: Resident bytes.
        files: Open files.
        threads: Threads.
        seconds: Of a processor since the run began.
    """

    step: int
    memory: int
    files: int
    threads: int
    seconds: float


def family(pid: int) -> list[int]:
    """A process and all that it has started."""
    found, waiting = [], [pid]
    while waiting:
        found.append(waiting.pop())
        for task in Path(f'/proc/{found[-1]}/task').glob('*/children'):
            waiting += map(int, task.read_text().split())
    return found


def sample(pid: int, step: int) -> Sample | None:
    """A sample of a running process; None if one of its family ended meanwhile."""
    memory = files = threads = 0
    ticks = 0
    try:
        for member in family(pid):
            # After the name, which may hold blanks.
            fields = Path(f'/proc/{member}/stat').read_text().rpartition(')')[2].split()
            ticks += int(fields[11]) + int(fields[12])
            threads += int(fields[17])
            memory += int(fields[21]) * PAGE
            files += len(os.listdir(f'/proc/{member}/fd'))
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Sample(step, memory, files, threads, ticks / TICKS)


def growth(samples: Sequence[Sample]) -> list[str]:
    """What has grown between the second and the last quarter of a run's steps.

    Raises:
        ValueError: If there are too few samples.
    """
    early, late = quarters(samples)
    if any(len(part) < 5 or part[0].step == part[-1].step for part in (early, late)):
        raise ValueError(f'{len(samples)} samples are too few; run for longer')
    found = []

    def compare(what: str, value: Callable[[Sample], float], allowed: float, unit: str) -> None:
        # The median: a checkpoint that is being written takes memory and a file for a moment.
        before, after = (median(map(value, part)) for part in (early, late))
        if after > before + allowed:
            found.append(f'{what}: from {before:g} to {after:g} {unit}')

    bytes_before = median(one.memory for one in early)
    allowed = max(MEMORY, MEMORY_SHARE * bytes_before) / 1e6
    compare('memory', lambda one: round(one.memory / 1e6, 1), allowed, 'MB')
    compare('open files', lambda one: one.files, HANDLES, '')
    compare('threads', lambda one: one.threads, HANDLES, '')
    before, after = map(seconds_of_a_step, (early, late))
    if after > before * (1 + TIME_SHARE):
        found.append(f'a step: from {1e3 * before:.1f} to {1e3 * after:.1f} ms of a processor')
    return found


def quarters(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Samples of the second and of the last quarter of a run's steps."""
    last = samples[-1].step
    early = [one for one in samples if last / 4 <= one.step < last / 2]
    return early, [one for one in samples if one.step >= last * 3 / 4]


def seconds_of_a_step(samples: Sequence[Sample]) -> float:
    """Processor seconds of a step within a stretch of a run."""
    steps = samples[-1].step - samples[0].step
    return (samples[-1].seconds - samples[0].seconds) / steps if steps else math.nan


def steps_done(work_dir: Path) -> int:
    """Steps that a run has logged."""
    for path in work_dir.glob('*/vis_data/scalars.json'):
        with open(path, 'rb') as file:
            file.seek(max(0, os.path.getsize(path) - 4096))
            lines = [line for line in file.read().split(b'\n') if line.endswith(b'}')]
        for line in reversed(lines):
            if line.startswith(b'{') and b'"loss"' in line:
                return int(json.loads(line)['step'])
    return 0


def train(name: str, steps: int, folder: Path) -> list[Sample]:
    """Run a recipe of the demo and sample it.

    Raises:
        RuntimeError: If it fails.
    """
    epochs = max(1, round(steps * BATCH[name] / IMAGES[name]))
    work_dir, log = folder / name, folder / f'{name}.log'
    data = folder / 'data' / ('unlabelled' if name == 'pretrain' else 'coco')
    command = [
        *(sys.executable, ROOT / 'tools/train.py', ROOT / f'configs/demo/{NAMES[name]}.py'),
        *(f'--work-dir={work_dir}', '--cfg-options', f'train_cfg.max_epochs={epochs}'),
        *(f'param_scheduler.1.end={epochs}', f'train_dataloader.dataset.data_root={data}/'),
    ]
    samples = []
    with open(log, 'wb') as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT)
    try:
        while process.poll() is None:
            if step := steps_done(work_dir):
                # Gone at the very end.
                if (one := sample(process.pid, step)) is not None:
                    samples.append(one)
            time.sleep(0.5)
    finally:
        process.kill()
        process.wait()
    if process.returncode != 0:
        raise RuntimeError(f'{name} failed:\n{log.read_text()[-3000:]}')
    # After the last step it leaves: workers go, and with them what they took.
    end = next((i for i, one in enumerate(samples) if one.step == samples[-1].step), -1)
    return samples[: end + 1]


def describe(samples: Sequence[Sample]) -> str:
    """One line: medians of the second and the last quarter of a run."""
    early, late = quarters(samples)
    figures = [
        ('memory', lambda one: round(one.memory / 1e6), ' MB'),
        ('open files', lambda one: one.files, ''),
        ('threads', lambda one: one.threads, ''),
    ]
    told = [
        f'{what} {median(map(value, early)):g} and {median(map(value, late)):g}{unit}'
        for what, value, unit in figures
    ]
    times = ' and '.join(f'{1e3 * seconds_of_a_step(part):.0f}' for part in (early, late))
    return f'{samples[-1].step} steps: {", ".join(told)}, a step {times} ms of a processor'


def main() -> None:
    """Run the command; exit code 1 if anything grows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--pretrain', type=int, default=3000, help='steps (default 3000)')
    parser.add_argument('--detect', type=int, default=500, help='steps (default 500)')
    args = parser.parse_args()
    from greenmim_mm.demo.data import DemoDataConfig, build_demo_data

    # As an exception, so that the run does not outlive this.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    grown = False
    with tempfile.TemporaryDirectory(prefix='long_run_') as place:
        folder = Path(place)
        numbers = dict(num_unlabelled=IMAGES['pretrain'], num_train=IMAGES['detect'], num_val=8)
        build_demo_data(folder / 'data', DemoDataConfig(**numbers))
        for name in NAMES:
            if not (steps := getattr(args, name)):
                continue
            samples = train(name, steps, folder)
            print(f'{name}, {describe(samples)}', flush=True)
            found = growth(samples)
            grown |= bool(found)
            print(f'{name}: ' + ('; '.join(found) or 'nothing grows'), flush=True)
    sys.exit(grown)


if __name__ == '__main__':
    main()
