"""Sharded training: two processes with gloo on the CPU compute what one computes without it."""

import importlib
import os
import socket
import sys
from copy import deepcopy
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import MMFullyShardedDataParallel
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from greenmim_mm.cli import runs
from greenmim_mm.models import GreenMIM, GreenSwin

ROOT = Path(__file__).resolve().parents[2]
LARGE = 'configs/greenmim/greenmim_swin-large-w14_8xb256-amp-coslr-200e_in1k'
POLICY = 'greenmim_mm.engine.strategies.wrap_swin_blocks'
ARCH = dict(embed_dims=16, depths=(1, 2, 2, 1), num_heads=(1, 2, 4, 8))
MODEL = dict(
    neck=dict(
        type='greenmim_mm.GreenMIMPretrainDecoder',
        embed_dim=128,
        decoder_embed_dim=32,
        decoder_num_heads=2,
    ),
    head=dict(
        type='mmpretrain.MAEPretrainHead',
        norm_pix=True,
        patch_size=32,
        loss=dict(type='mmpretrain.PixelReconstructionLoss', criterion='L2'),
    ),
    data_preprocessor=dict(type='mmpretrain.SelfSupDataPreprocessor'),
)
V1 = dict(type='greenmim_mm.GreenSwin', arch=ARCH, window_size=3, drop_path_rate=0.0)
V2 = V1 | dict(type='greenmim_mm.GreenSwinV2', arch=ARCH | dict(extra_norm_every_n_blocks=0))
BACKBONES = {
    'v1': V1,
    'v2': V2,
    'v1-checkpointed': V1 | dict(with_cp=True),
    'v2-checkpointed-sequential': V2 | dict(with_cp=2, sequential_groups=1),
}
MASK = np.arange(9) % 3 != 0
STEPS = 2

# A recipe on the CPU.
RUN = """
_base_ = {base!r}
model = dict(
    backbone=dict(arch=dict(_delete_=True, **{arch!r}), window_size=3),
    neck=dict(embed_dim=128, decoder_embed_dim=32, decoder_num_heads=2),
)
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    dataset=dict(
        data_root={data!r},
        data_prefix='',
        pipeline=[
            dict(type='greenmim_mm.LoadImageFromFile'),
            dict(type='Resize', scale=(96, 96)),
            dict(type='PackInputs'),
        ],
    ),
)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(lr=1.0))
default_hooks = dict(logger=dict(interval=1))
strategy = dict(model_wrapper=dict(device_id='cpu'))
"""


def make_model(backbone: dict) -> GreenMIM:
    torch.manual_seed(0)
    model = GreenMIM(backbone=deepcopy(backbone), **deepcopy(MODEL))
    model.init_weights()
    for name, parameter in model.named_parameters():
        if 'norm' in name:  # those of V2 start at zero, and hide what is below them
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    model.draw_mask = lambda grid: MASK
    return model.double()


def images_of(rank: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.rand(2, 3, 96, 96, generator=generator).double()


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def clean(name: str) -> str:
    return name.replace('_fsdp_wrapped_module.', '')


def train_sharded(rank: int, backbone: dict) -> dict:
    """Some steps of FSDP; gradients and parameters are gathered after each."""
    model = MMFullyShardedDataParallel(
        make_model(backbone), auto_wrap_policy=POLICY, use_orig_params=True, device_id='cpu'
    )
    units = [name for name, module in model.named_modules() if isinstance(module, FSDP)]
    result = dict(
        units=[clean(f'{name}.').rstrip('.') for name in units],
        share=sum(p.numel() for p in model.parameters()),
        losses=[],
        gradients=[],
        parameters=[],
    )
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(images_of(rank, step), mode='loss')['loss']
        loss.backward()
        result['losses'].append(loss.item())
        with FSDP.summon_full_params(model, with_grads=True):
            pairs = [(clean(n), p.grad.clone()) for n, p in model.named_parameters()]
            result['gradients'].append(dict(pairs))
        optimizer.step()
        with FSDP.summon_full_params(model):
            pairs = [(clean(n), p.detach().clone()) for n, p in model.named_parameters()]
            result['parameters'].append(dict(pairs))
    return result


def run_tool(config: str, work_dir: str, *args: str) -> None:
    """tools/train.py in a process whose group is there already."""
    sys.path.insert(0, str(ROOT / 'tools'))
    importlib.import_module('train').main(
        [config, f'--work-dir={work_dir}', '--launcher=pytorch', *args]
    )
    MessageHub._instance_dict.clear()


def work(rank: int, port: int, folder: str) -> None:
    """All that needs two processes: starting them takes longer than what they do."""
    os.environ.update(
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE='2',
    )
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=2)
    for name, backbone in BACKBONES.items():
        torch.save(train_sharded(rank, backbone), f'{folder}/{name}_{rank}.pth')
    config = f'{folder}/run.py'
    for name, epochs in (('whole', 2), ('stopped', 1)):
        run_tool(config, f'{folder}/{name}', '--cfg-options', f'train_cfg.max_epochs={epochs}')
    run_tool(config, f'{folder}/stopped', '--resume', '--cfg-options', 'train_cfg.max_epochs=2')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    if not hasattr(torch.compiler, 'is_compiling'):
        pytest.skip('FSDP of torch 2.1 does not run on a CPU')
    folder = tmp_path_factory.mktemp('sharding')
    (folder / 'images').mkdir()
    rng = np.random.default_rng(0)
    for index in range(8):
        image = cv2.resize(rng.integers(0, 256, (5, 5, 3), np.uint8), (96, 96))
        assert cv2.imwrite(str(folder / f'images/{index}.png'), image)
    base = str(ROOT / f'{LARGE}_fsdp.py')
    text = RUN.format(base=base, arch=ARCH, data=str(folder / 'images'))
    (folder / 'run.py').write_text(text)
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    mp.spawn(work, (port, str(folder)), nprocs=2)
    return folder


@pytest.mark.parametrize('name', BACKBONES)
def test_fsdp_trains_as_one_process_does(folder, name):
    shards = [torch.load(folder / f'{name}_{rank}.pth') for rank in (0, 1)]
    model = make_model(BACKBONES[name])
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = [model(images_of(rank, step), mode='loss')['loss'] for rank in (0, 1)]
        (sum(losses) / 2).backward()
        for rank, shard in enumerate(shards):
            assert shard['losses'][step] == pytest.approx(losses[rank].item(), rel=1e-9)
        for key, parameter in model.named_parameters():
            assert parameter.grad.abs().max() > 0, key
            for shard in shards:
                torch.testing.assert_close(
                    shard['gradients'][step].pop(key), parameter.grad, rtol=1e-7, atol=1e-11
                )
        optimizer.step()
        for key, parameter in model.named_parameters():
            for shard in shards:
                # Adam divides by gradients, some of which are tiny.
                torch.testing.assert_close(
                    shard['parameters'][step].pop(key), parameter, rtol=1e-6, atol=1e-8
                )
        assert not any(shard['gradients'][step] or shard['parameters'][step] for shard in shards)


@pytest.mark.parametrize('name', BACKBONES)
def test_every_block_is_a_unit_and_each_process_holds_half(folder, name):
    shards = [torch.load(folder / f'{name}_{rank}.pth') for rank in (0, 1)]
    model = make_model(BACKBONES[name])
    blocks = {
        f'backbone.stages.{stage}.blocks.{block}'
        for stage, depth in enumerate(ARCH['depths'])
        for block in range(depth)
    }
    assert set(shards[0]['units']) == blocks | {''}
    total = sum(parameter.numel() for parameter in model.parameters())
    # Each unit is padded to an even count.
    for shard in shards:
        assert abs(shard['share'] - total / 2) <= len(shard['units'])


def test_recipe_resumes_where_it_stopped(folder):
    whole, resumed = (
        torch.load(folder / name / 'epoch_2.pth', weights_only=False)
        for name in ('whole', 'stopped')
    )
    first = torch.load(folder / 'whole/epoch_1.pth', weights_only=False)
    assert whole['meta']['iter'] == resumed['meta']['iter'] == 4
    for key, value in whole['state_dict'].items():
        torch.testing.assert_close(resumed['state_dict'][key], value, rtol=1e-5, atol=1e-6)
        if key.endswith('.weight'):
            assert not torch.equal(first['state_dict'][key], value)
    for key, state in whole['optimizer']['state'].items():
        assert state['step'] == resumed['optimizer']['state'][key]['step'] == 4
        assert state['exp_avg'].shape == whole['state_dict'][key].shape
        assert not torch.equal(state['exp_avg'], state['exp_avg_sq'])
        for moment in ('exp_avg', 'exp_avg_sq'):
            torch.testing.assert_close(
                resumed['optimizer']['state'][key][moment], state[moment], rtol=1e-5, atol=1e-7
            )
    settings = [run['optimizer']['base_param_settings'] for run in (whole, resumed)]
    assert settings[0]['lr'] == settings[1]['lr'] > first['optimizer']['base_param_settings']['lr']


def test_checkpoint_of_a_sharded_run_is_an_ordinary_one(folder):
    checkpoint = folder / 'whole/epoch_2.pth'
    init_cfg = dict(type='Pretrained', checkpoint=str(checkpoint))
    backbone = GreenSwin(ARCH, window_size=3, init_cfg=init_cfg)
    backbone.init_weights()
    saved = torch.load(checkpoint, weights_only=False)['state_dict']
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, saved[f'backbone.{key}']), key


@pytest.mark.skipif(
    not hasattr(torch.compiler, 'is_compiling'),
    reason='torch 2.1 has no squared error in bfloat16 on a CPU',
)
@pytest.mark.parametrize('backbone', [V1, V2])
def test_step_in_bfloat16_as_deepspeed_does_it(backbone):
    """DeepSpeed itself is not here; it casts the whole model and its input."""
    model = make_model(backbone)
    expected = model(images_of(0, 0), mode='loss')['loss'].item()
    model.bfloat16()
    loss = model(images_of(0, 0).bfloat16(), mode='loss')['loss']
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=0.05)
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.bfloat16 and parameter.grad.isfinite().all(), name


@pytest.fixture
def refused(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    train = importlib.import_module('train')

    def call(*args):
        with pytest.raises(SystemExit) as exit_info:
            train.main([*args])
        assert exit_info.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        return lines[0]

    return call


@pytest.mark.parametrize('strategy', ['fsdp', 'deepspeed-zero2'])
def test_recipes_differ_from_theirs_in_the_strategy_alone(strategy):
    plain = Config.fromfile(ROOT / f'{LARGE}.py').to_dict()
    sharded = Config.fromfile(ROOT / f'{LARGE}_{strategy}.py').to_dict()
    assert sharded.pop('runner_type') == 'FlexibleRunner'
    assert sharded.pop('strategy')['type'].endswith('Strategy')
    if strategy != 'fsdp':
        assert sharded['optim_wrapper'].pop('type') == 'DeepSpeedOptimWrapper'
        plain['optim_wrapper'].pop('type')
    assert sharded == plain


def test_bad_input(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, 'get_device', lambda: 'cpu')
    monkeypatch.setitem(sys.modules, 'deepspeed', None)
    fsdp, zero = (str(ROOT / f'{LARGE}_{name}.py') for name in ('fsdp', 'deepspeed-zero2'))
    options = [f'--work-dir={tmp_path}', '--cfg-options', 'optim_wrapper.type=OptimWrapper']
    assert 'with torchrun, and give --launcher pytorch' in refused(fsdp, *options)
    assert 'needs GPUs' in refused(fsdp, '--launcher=pytorch', *options)
    assert 'FlexibleRunner' in refused(fsdp, *options, 'runner_type=Runner')
    assert 'pip install deepspeed' in refused(zero, '--launcher=pytorch')
    assert 'strategy.bf16.enabled=True' in refused(zero, '--amp')
    assert 'does not exist' in refused(fsdp, f'--resume={tmp_path}/none', *options)
