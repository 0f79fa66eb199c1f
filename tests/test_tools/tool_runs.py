"""What tests of the tools share: recipes, a network of a few numbers, and what a run has logged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / 'configs/custom/greenmim_swin-tiny-w7_1xb128-amp-coslr-100e_custom.py'
DETECTOR = ROOT / 'configs/mask_rcnn/mask-rcnn_greenmim-swin-base-w7_fpn_amp-ms-crop-3x_coco.py'
SMALL_CONFIG = """
_base_ = {base!r}
model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True, embed_dims=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8)
        )
    ),
    neck=dict(embed_dim=128, decoder_embed_dim=32, decoder_num_heads=2),
)
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    dataset=dict(
        data_root={data!r},
        pipeline=[
            dict(type='greenmim_mm.LoadImageFromFile'),
            dict(type='RandomResizedCrop', scale=96),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PackInputs'),
        ],
    ),
)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(lr=1e-3))
default_hooks = dict(checkpoint=dict(interval=1), logger=dict(interval=1))
log_processor = dict(window_size=1)
"""


def run_tool(name: str, *args: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / 'tools' / f'{name}.py', *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
    )


def refused(tool, capsys, *args: object) -> str:
    """The line that the tool ends with; nothing else is on stderr."""
    with pytest.raises(SystemExit) as exit_info:
        tool.main([str(arg) for arg in args])
    assert exit_info.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert ': error: ' in lines[0] and 'Traceback' not in lines[0]
    return lines[0]


def scalars(work_dir: Path) -> list[dict]:
    """What the last run in a work dir has logged, iteration by iteration."""
    path = max(work_dir.glob('*/vis_data/scalars.json'))
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(work_dir: Path) -> list[float]:
    """Losses of the last run in a work dir."""
    return [record['loss'] for record in scalars(work_dir)]
