"""compile= in a config: the same losses, and eager where no compiler is."""

import json
import logging
import os
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.runner import Runner
from PIL import Image
from runner_globals import forget_runs

from greenmim_mm.cli import runs
from greenmim_mm.compat import compiles_plans

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / 'configs/custom/greenmim_swin-tiny-w7_1xb128-amp-coslr-100e_custom.py'


def config_of(folder, name, **changes):
    cfg = Config.fromfile(RECIPE)
    cfg.merge_from_dict(
        {
            'model.backbone.arch': dict(
                embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), _delete_=True
            ),
            'model.neck.embed_dim': 128,
            'model.neck.decoder_embed_dim': 32,
            'model.neck.decoder_num_heads': 2,
            'train_dataloader.dataset.data_root': str(folder),
            'train_dataloader.dataset.pipeline.0.scale': 128,
            'train_dataloader.batch_size': 2,
            'train_dataloader.num_workers': 0,
            'train_dataloader.persistent_workers': False,
            'optim_wrapper.type': 'OptimWrapper',
            'optim_wrapper.optimizer.lr': 1e-3,
            'train_cfg.max_epochs': 3,
            'default_hooks.logger.interval': 1,
            'log_processor': dict(window_size=1),
            'randomness.seed': 0,
            'work_dir': str(folder.parent / name),
            **changes,
        },
    )
    return cfg


def losses(cfg):
    runs.check_training(cfg)
    Runner.from_cfg(cfg).train()
    (path,) = Path(cfg.work_dir).glob('*/vis_data/scalars.json')
    return [json.loads(line)['loss'] for line in path.read_text().splitlines()]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'images').mkdir()
    for number in range(4):
        image = Image.effect_noise((6, 5), 200).resize((160, 140)).convert('RGB')
        image.save(tmp_path / f'images/{number}.png')
    return tmp_path / 'images'


def test_an_old_compiler_is_left_out(monkeypatch):
    monkeypatch.setattr(runs, 'compiles_plans', lambda: False)
    assert 'fails on plans; use a later one' in runs.compiler_obstacle()


@pytest.mark.skipif(not compiles_plans(), reason='TorchDynamo of torch 2.1 fails on plans')
def test_compiled_steps_are_the_same_steps(folder):
    """As Dynamo captures them; what the backends behind it make of that is PyTorch's own."""
    eager = losses(config_of(folder, 'eager'))
    assert len(eager) == 6
    forget_runs()
    compiled = losses(config_of(folder, 'compiled', compile=dict(backend='eager')))
    assert compiled == pytest.approx(eager, rel=1e-4)


@pytest.mark.skipif(not compiles_plans(), reason='TorchDynamo of torch 2.1 fails on plans')
def test_without_a_compiler_a_run_is_eager(folder, monkeypatch, caplog):
    cfg = config_of(folder, 'run', compile=True)
    with caplog.at_level(logging.WARNING):
        monkeypatch.setenv('PATH', os.devnull)
        monkeypatch.delenv('CXX', raising=False)
        monkeypatch.setattr(runs, 'print_log', lambda text, *_: caplog.records.append(text))
        runs.check_training(cfg)
    assert cfg.compile is False
    assert 'compile=True is left out: there is no C++ compiler (g++' in caplog.records[-1]
    monkeypatch.setattr(runs.shutil, 'which', lambda name: name)
    monkeypatch.setattr(runs, 'get_device', lambda: 'cuda')
    monkeypatch.setattr(runs, 'find_spec', lambda name: None)
    assert 'pip install triton' in runs.compiler_obstacle()
    monkeypatch.setattr(runs, 'get_device', lambda: 'cpu')
    assert runs.compiler_obstacle() is None
