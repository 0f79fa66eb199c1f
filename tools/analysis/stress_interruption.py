"""Kills a training run again and again, and compares it with one that was left alone.

Each round trains a small GreenMIM on pictures that are made up, ends it with SIGKILL at a random
moment, resumes it with --resume, and so on until it is finished. Its losses, iteration by
iteration, and its final weights must equal those of the uninterrupted run bit by bit.

Example:
    python tools/analysis/stress_interruption.py --kills 20
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EPOCHS, STEPS, BATCH = 3, 8, 2
CONFIG = """
_base_ = {base!r}
model = dict(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)),
        drop_path_rate=0.2,
    ),
    neck=dict(embed_dim=128, decoder_embed_dim=32, decoder_num_heads=2),
)
train_dataloader = dict(
    batch_size={batch}, num_workers={workers}, dataset=dict(data_root={data!r})
)
train_cfg = dict(max_epochs={epochs})
optim_wrapper = dict(type='OptimWrapper')
default_hooks = dict(
    checkpoint=dict(by_epoch=False, interval={interval}, max_keep_ckpts=2),
    logger=dict(interval=1),
)
log_processor = dict(window_size=1)
"""


def make_images(folder: Path, count: int) -> None:
    """Write smooth random pictures."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
        coarse.resize((120, 100), Image.Resampling.BICUBIC).save(folder / f'{index}.png')


def make_config(folder: Path, interval: int = 3, workers: int = 1) -> Path:
    """Write the config of a run on pictures below ``folder``."""
    make_images(folder / 'images', STEPS * BATCH)
    config = folder / 'stress.py'
    base = ROOT / 'configs/custom/greenmim_swin-tiny-w7_1xb128-amp-coslr-100e_custom.py'
    config.write_text(
        CONFIG.format(
            base=str(base),
            batch=BATCH,
            workers=workers,
            data=str(folder / 'images'),
            epochs=EPOCHS,
            interval=interval,
        )
    )
    return config


def start(config: Path, work_dir: Path) -> subprocess.Popen:
    """Start a run, or go on with it, with its processes in a group of their own."""
    with open(work_dir.with_suffix('.log'), 'ab') as log:
        return subprocess.Popen(
            [
                *(sys.executable, ROOT / 'tools/train.py', config),
                *(f'--work-dir={work_dir}', '--resume'),
            ],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def kill(process: subprocess.Popen) -> None:
    """End a run and its workers as a power cut does."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def losses(work_dir: Path) -> dict[int, list[float]]:
    """Losses that were logged, for each iteration: by all parts of a run."""
    found: dict[int, list[float]] = {}
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            # A part that was killed may have left half a line.
            if line.endswith('}'):
                record = json.loads(line)
                found.setdefault(record['step'], []).append(record['loss'])
    return found


def finish(config: Path, work_dir: Path) -> None:
    """Train to the end.

    Raises:
        RuntimeError: If that fails.
        subprocess.TimeoutExpired: If it takes ten minutes; the run is killed.
    """
    process = start(config, work_dir)
    try:
        code = process.wait(timeout=600)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    if code != 0:
        raise RuntimeError(work_dir.with_suffix('.log').read_text()[-3000:])


def wait_for(work_dir: Path, iteration: int, process: subprocess.Popen) -> bool:
    """Wait until an iteration is logged; False if the run ended before."""
    while process.poll() is None:
        if max(losses(work_dir), default=0) >= iteration:
            return True
        time.sleep(0.05)
    return False


def compare(whole: Path, killed: Path) -> None:
    """Raise ``RuntimeError`` unless two runs had the same losses and have the same weights."""
    import torch

    expected, found = losses(whole), losses(killed)
    for step in range(1, EPOCHS * STEPS + 1):
        values = set(expected[step] + found.get(step, [float('nan')]))
        if len(values) != 1:
            raise RuntimeError(f'losses of iteration {step} differ: {sorted(values)}')
    first, second = (
        torch.load(path / f'iter_{EPOCHS * STEPS}.pth', weights_only=False)['state_dict']
        for path in (whole, killed)
    )
    different = [name for name in first if not torch.equal(first[name], second[name])]
    if different or first.keys() != second.keys():
        raise RuntimeError(f'weights differ: {different}')


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--kills', type=int, default=20, help='times to kill (default 20)')
    parser.add_argument('--workers', type=int, default=1, help='workers of the loader (default 1)')
    parser.add_argument('--seed', type=int, default=0, help='of the moments (default 0)')
    args = parser.parse_args()
    rng = random.Random(args.seed)
    folder = Path(tempfile.mkdtemp(prefix='stress_interruption_'))
    config = make_config(folder, workers=args.workers)
    whole = folder / 'whole'
    finish(config, whole)
    kills = rounds = 0
    while kills < args.kills:
        rounds += 1
        work_dir = folder / f'round_{rounds}'
        done = 0
        while kills < args.kills:
            process = start(config, work_dir)
            # Anything from the middle of the set-up to the middle of writing.
            if not wait_for(work_dir, done + rng.randrange(7), process):
                break
            time.sleep(rng.random())
            kill(process)
            kills += 1
            done = max(losses(work_dir), default=0)
            print(f'kill {kills} of {args.kills}: round {rounds}, iteration {done}', flush=True)
        finish(config, work_dir)
        compare(whole, work_dir)
        print(f'round {rounds}: losses and weights are equal bit by bit', flush=True)
    shutil.rmtree(folder)
    print(f'{kills} kills in {rounds} rounds: nothing lost')


if __name__ == '__main__':
    main()
