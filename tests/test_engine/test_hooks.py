"""Hooks for runs that nothing is lost of, on a GreenMIM so small that an epoch takes a second."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.fileio import LocalBackend
from mmengine.hooks import Hook
from mmengine.logging import MessageHub, MMLogger
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import HOOKS, OPTIM_WRAPPERS, DefaultScope
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from PIL import Image
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from greenmim_mm.datasets import DataError
from greenmim_mm.engine.checkpoints import CheckpointError, damage, last_checkpoint, read_meta
from greenmim_mm.engine.hooks import CheckpointHook, Interruption, NonFiniteLossError, ResumeError
from greenmim_mm.engine.hooks.gradient_norm import gradient_norm
from greenmim_mm.engine.hooks.non_finite import first_non_finite

NUM_IMAGES, BATCH = 10, 2
STEPS = NUM_IMAGES // BATCH


@HOOKS.register_module(force=True)
class AtIteration(Hook):
    """Do something within an iteration, and keep the losses of all."""

    priority = 'VERY_LOW'
    losses: dict[int, float] = {}
    actions: dict = {}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses[runner.iter] = outputs['loss'].item()
        if runner.iter in self.actions:
            self.actions[runner.iter](runner)


@pytest.fixture(autouse=True)
def no_traces_of_runners():
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for manager in (MessageHub, DefaultScope, MMLogger, Visualizer):
        manager._instance_dict.clear()
    AtIteration.actions, AtIteration.losses = {}, {}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for index in range(NUM_IMAGES):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
        coarse.resize((80, 72), Image.Resampling.BICUBIC).save(root / f'{index}.png')
    return root


def config(work_dir, folder, epochs=3, workers=0, batch=BATCH, checkpoint=None, **changes):
    """A run whose crops, flips, masks and paths through the network are all random."""
    pipeline = [
        dict(type='greenmim_mm.LoadImageFromFile'),
        dict(type='RandomResizedCrop', scale=64, crop_ratio_range=(0.2, 1.0)),
        dict(type='RandomFlip', prob=0.5),
        dict(type='PackInputs'),
    ]
    cfg = dict(
        default_scope='mmpretrain',
        work_dir=str(work_dir),
        model=dict(
            type='greenmim_mm.GreenMIM',
            data_preprocessor=dict(
                type='SelfSupDataPreprocessor', mean=[124.0] * 3, std=[58.0] * 3, bgr_to_rgb=True
            ),
            backbone=dict(
                type='greenmim_mm.GreenSwin',
                arch=dict(embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)),
                img_size=64,
                window_size=4,
                drop_path_rate=0.3,
            ),
            neck=dict(
                type='greenmim_mm.GreenMIMPretrainDecoder',
                embed_dim=64,
                decoder_embed_dim=16,
                decoder_depth=1,
                decoder_num_heads=1,
            ),
            head=dict(
                type='MAEPretrainHead',
                norm_pix=True,
                patch_size=32,
                loss=dict(type='PixelReconstructionLoss', criterion='L2'),
            ),
            mask_ratio=0.5,
        ),
        train_dataloader=dict(
            batch_size=batch,
            num_workers=workers,
            persistent_workers=workers > 0,
            sampler=dict(type='greenmim_mm.RepeatableSampler', shuffle=True),
            collate_fn=dict(type='default_collate'),
            dataset=dict(
                type='greenmim_mm.UnlabelledImages', data_root=str(folder), pipeline=pipeline
            ),
        ),
        train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=epochs),
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3)),
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.1, end=STEPS, by_epoch=False),
            dict(type='MultiStepLR', milestones=[2], by_epoch=True),
        ],
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=dict(
                **(dict(type='greenmim_mm.CheckpointHook', interval=1) | (checkpoint or {}))
            ),
        ),
        custom_hooks=[
            dict(type='greenmim_mm.RepeatableRunHook'),
            dict(type='greenmim_mm.InterruptionHook'),
            dict(type='greenmim_mm.NonFiniteLossHook'),
            dict(type='greenmim_mm.GradientNormHook'),
            dict(type='mmengine.AtIteration'),
        ],
        randomness=dict(seed=3),
        log_level='WARNING',
    )
    return Config(cfg | changes)


def train(cfg, resume=False):
    """Train; the losses of the iterations that were run, and the final weights."""
    cfg = cfg.copy()
    if resume:
        path = last_checkpoint(cfg.work_dir) if resume is True else resume
        cfg.resume, cfg.load_from = path is not None, path and str(path)
    cfg.experiment_name = f'run{len(MMLogger._instance_dict)}_{os.urandom(4).hex()}'
    AtIteration.losses = {}
    runner = Runner.from_cfg(cfg)
    runner.train()
    return dict(AtIteration.losses), runner.model.state_dict()


def weights(path):
    return torch.load(path, weights_only=False)['state_dict']


def assert_same(first, second):
    """Bit by bit."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.fixture(scope='module')
def whole(folder, tmp_path_factory):
    """An uninterrupted run: losses and final weights."""
    return train(config(tmp_path_factory.mktemp('whole'), folder))


def interrupt_at(iteration, number=signal.SIGTERM):
    AtIteration.actions = {iteration: lambda runner: os.kill(os.getpid(), number)}


@pytest.mark.parametrize('workers', [0, 2])
def test_resumed_in_the_middle_of_an_epoch(folder, tmp_path, whole, workers):
    """Two interruptions: mid-epoch and at an epoch's very end; losses and weights are equal."""
    losses, final = whole
    assert sorted(losses) == list(range(3 * STEPS))
    cfg = config(tmp_path, folder, workers=workers, checkpoint=dict(max_keep_ckpts=1))
    seen = {}
    for iteration, number in ((1, signal.SIGTERM), (2 * STEPS - 1, signal.SIGINT)):
        interrupt_at(iteration, number)
        with pytest.raises(Interruption) as error_info:
            train(cfg, resume=True)
        assert error_info.value.code == 128 + number
        assert f'saved {tmp_path}/interrupted_iter_{iteration + 1}.pth' in str(error_info.value)
        assert max(AtIteration.losses) == iteration and not seen.keys() & AtIteration.losses.keys()
        seen |= AtIteration.losses
        assert signal.getsignal(number) is not None
    AtIteration.actions = {}
    rest, weights_now = train(cfg, resume=True)
    seen |= rest
    assert seen == losses
    assert_same(weights_now, final)
    # The checkpoints of the interruptions are gone, the last regular one is left.
    assert sorted(path.name for path in tmp_path.glob('*.pth')) == ['epoch_3.pth']


def test_checkpoints_by_iteration(folder, tmp_path, whole):
    cfg = config(tmp_path, folder, checkpoint=dict(by_epoch=False, interval=4, max_keep_ckpts=2))
    losses, final = train(cfg)
    assert losses == whole[0]
    assert sorted(path.name for path in tmp_path.glob('*.pth')) == ['iter_12.pth', 'iter_15.pth']
    rest, again = train(cfg, resume=tmp_path / 'iter_12.pth')
    assert rest == {k: v for k, v in losses.items() if k >= 12}
    assert_same(again, final)


def test_signals_of_every_kind(folder, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGINT)]
    interrupt_at(2, signal.SIGUSR1)
    with pytest.raises(Interruption) as error_info:
        train(config(tmp_path, folder))
    assert error_info.value.code == 128 + signal.SIGUSR1
    assert 'SIGUSR1 after iteration 3 of 15' in str(error_info.value)
    assert '--resume' in str(error_info.value)
    assert before == [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGINT)]

    def twice(runner):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    AtIteration.actions = {0: twice}
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path, folder))


def test_signals_are_as_before_whatever_ends_a_run(folder, tmp_path):
    def fail(runner):
        raise RuntimeError('something else')

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    AtIteration.actions = {1: fail}
    with pytest.raises(RuntimeError, match='something else'):
        train(config(tmp_path, folder))
    assert [signal.getsignal(number) for number in numbers] == before
    # The run listened until then.
    AtIteration.actions = {1: lambda runner: before.append(signal.getsignal(signal.SIGTERM))}
    train(config(tmp_path, folder))
    assert before[-1] not in before[:-1]


def test_gradients_that_are_added_up_are_not_cut(folder, tmp_path):
    cfg = config(tmp_path, folder, epochs=2)
    cfg.optim_wrapper.accumulative_counts = 3
    losses, final = train(cfg.copy())
    shutil.rmtree(tmp_path)
    interrupt_at(3)
    with pytest.raises(Interruption, match='after iteration 6'):
        train(cfg)
    AtIteration.actions = {}
    rest, again = train(cfg, resume=True)
    assert rest == {k: v for k, v in losses.items() if k >= 6}
    assert_same(again, final)


def test_another_batch_size_is_refused(folder, tmp_path):
    train(config(tmp_path, folder, epochs=1))
    with pytest.raises(ResumeError) as error_info:
        train(config(tmp_path, folder, epochs=2, batch=5), resume=True)
    message = str(error_info.value)
    assert 'a run with 2 images in a step, this one has 5' in message
    assert 'train_dataloader.batch_size=2 ' in message and '\n' not in message
    # A checkpoint of mmengine alone does not say how large its batch was.
    path = tmp_path / 'epoch_1.pth'
    checkpoint = torch.load(path, weights_only=False)
    checkpoint['message_hub']['runtime_info'].pop('images_of_a_step')
    torch.save(checkpoint, path)
    with pytest.raises(ResumeError, match='stands at iteration 5 in epoch 2, but 2 iterations'):
        train(config(tmp_path, folder, epochs=2, batch=5), resume=True)


def test_full_disk(folder, tmp_path, monkeypatch):
    """The last checkpoint stays whole, nothing half-written is left, and the message says so."""
    put = LocalBackend.put

    def full(self, obj, filepath):
        if 'epoch_2' in str(filepath):
            Path(filepath).write_bytes(obj[: len(obj) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put(self, obj, filepath)

    monkeypatch.setattr(LocalBackend, 'put', full)
    cfg = config(tmp_path, folder, checkpoint=dict(max_keep_ckpts=1))
    with pytest.raises(CheckpointError) as error_info:
        train(cfg)
    message = str(error_info.value)
    assert f'checkpoint {tmp_path}/epoch_2.pth cannot be written: No space left' in message
    assert f'go on with --resume: {tmp_path}/epoch_1.pth is whole' in message
    assert {path.name for path in tmp_path.iterdir() if 'epoch' in path.name} == {'epoch_1.pth'}
    assert not damage(tmp_path / 'epoch_1.pth')
    monkeypatch.undo()
    losses, _ = train(cfg, resume=True)
    assert sorted(losses) == list(range(STEPS, 3 * STEPS))


def test_killed_while_writing(folder, tmp_path, monkeypatch):
    """However little has reached the disk, the checkpoint before is there and is named."""
    put = LocalBackend.put

    class Killed(BaseException):
        pass

    def killed(self, obj, filepath):
        put(self, obj[:1000] if 'epoch_2' in str(filepath) else obj, filepath)
        if 'epoch_2' in str(filepath):
            raise Killed

    monkeypatch.setattr(LocalBackend, 'put', killed)
    cfg = config(tmp_path, folder, epochs=2, checkpoint=dict(max_keep_ckpts=1))
    with pytest.raises(Killed):
        train(cfg)
    monkeypatch.undo()
    assert list(tmp_path.glob('.*.part'))
    assert last_checkpoint(tmp_path) == tmp_path / 'epoch_1.pth'
    losses, _ = train(cfg, resume=True)
    assert sorted(losses) == list(range(STEPS, 2 * STEPS))
    assert not list(tmp_path.glob('.*.part'))


def save(path, epoch):
    content = dict(meta=dict(epoch=epoch, iter=5 * epoch), state_dict=dict(x=torch.rand(1000)))
    torch.save(content, path)


def test_damaged_checkpoints(tmp_path):
    assert last_checkpoint(tmp_path) is None is last_checkpoint(tmp_path / 'nowhere')
    for epoch in (8, 9, 10):
        save(tmp_path / f'epoch_{epoch}.pth', epoch)
    last = tmp_path / 'epoch_10.pth'
    (tmp_path / 'last_checkpoint').write_text(str(last))
    assert last_checkpoint(tmp_path) == last and read_meta(last)['epoch'] == 10
    content = last.read_bytes()
    # A bit anywhere in the tensors; torch.load sees nothing.
    place = content.index(torch.load(last, weights_only=False)['state_dict']['x'].numpy().tobytes())
    flipped = bytearray(content)
    flipped[place + 1234] ^= 0x10
    for damaged in (bytes(flipped), content[:-100], content[: len(content) // 2], b'', b'words'):
        last.write_bytes(damaged)
        assert damage(last)
        assert last_checkpoint(tmp_path) == tmp_path / 'epoch_9.pth'  # not 8, though 8 < 10 < 9
    (tmp_path / 'epoch_9.pth').write_bytes(b'')
    assert last_checkpoint(tmp_path) == tmp_path / 'epoch_8.pth'
    (tmp_path / 'epoch_8.pth').write_bytes(b'')
    with pytest.raises(CheckpointError, match=r'no checkpoint in .* is whole: .*epoch_10.pth'):
        last_checkpoint(tmp_path)


def test_every_bit_of_the_tensors_counts(tmp_path):
    path = tmp_path / 'epoch_1.pth'
    save(path, 1)
    content = path.read_bytes()
    tensor = torch.load(path, weights_only=False)['state_dict']['x'].numpy().tobytes()
    start = content.index(tensor)
    for place in np.random.default_rng(0).integers(start, start + len(tensor), 200):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        assert 'checksum' in damage(path)


def test_folders_that_are_copied_or_moved(tmp_path):
    old, new = tmp_path / 'old', tmp_path / 'new'
    old.mkdir()
    save(old / 'epoch_1.pth', 1)
    (old / 'last_checkpoint').write_text(str(old / 'epoch_1.pth'))
    shutil.copytree(old, new)
    assert last_checkpoint(new) == new / 'epoch_1.pth'
    shutil.rmtree(old)
    assert last_checkpoint(new) == new / 'epoch_1.pth'
    # Checkpoints that lie elsewhere are found by their path.
    (new / 'epoch_1.pth').rename(tmp_path / 'epoch_1.pth')
    (new / 'last_checkpoint').write_text(str(tmp_path / 'epoch_1.pth'))
    assert last_checkpoint(new) == tmp_path / 'epoch_1.pth'


def test_runs_go_on_in_copied_and_moved_folders(folder, tmp_path, whole):
    """And do nothing to the folder that they are a copy of."""
    first, copied, moved = (tmp_path / name for name in ('first', 'copied', 'moved'))
    seen = {}
    for work_dir, iteration in ((first, STEPS + 1), (copied, STEPS + 3)):
        interrupt_at(iteration)
        with pytest.raises(Interruption):
            train(config(work_dir, folder), resume=True)
        seen |= AtIteration.losses
        if work_dir == first:
            shutil.copytree(first, copied)
            before = {path: path.read_bytes() for path in first.rglob('*') if path.is_file()}
    copied.rename(moved)
    AtIteration.actions = {}
    rest, final = train(config(moved, folder), resume=True)
    assert seen | rest == whole[0] and min(rest) == STEPS + 4
    assert_same(final, whole[1])
    assert {p: p.read_bytes() for p in first.rglob('*') if p.is_file()} == before
    assert not copied.exists()


def test_the_best_checkpoint_is_that_of_the_own_folder(tmp_path):
    hub = MessageHub.get_instance('best')
    hub.update_info('best_ckpt', '/elsewhere/best_acc_epoch_1.pth')
    runner = SimpleNamespace(
        work_dir=str(tmp_path), message_hub=hub, logger=MMLogger.get_instance('best')
    )
    hook = CheckpointHook(save_best='acc', rule='greater')
    hook.before_train(runner)
    assert hook.best_ckpt_path == str(tmp_path / 'best_acc_epoch_1.pth')


def test_bad_images_are_named_in_the_work_folder(folder, tmp_path):
    data = tmp_path / 'data'
    shutil.copytree(folder, data)
    (data / '3.png').write_bytes((folder / '3.png').read_bytes()[:-200])
    (data / '7.png').write_bytes(b'')
    run = tmp_path / 'run'
    run.mkdir()
    (run / 'bad_images.txt').write_text('of another run\tx\n')
    losses, _ = train(config(run, data, workers=2))
    assert sorted(losses) == list(range(3 * STEPS))
    lines = (run / 'bad_images.txt').read_text().splitlines()
    assert sorted(line.split('\t')[0] for line in lines) == [
        str(data / '3.png'),
        str(data / '7.png'),
    ]
    assert all('Error' in line.split('\t')[1] for line in lines)
    cfg = config(run, data)
    cfg.train_dataloader.dataset.max_bad = 1
    with pytest.raises(DataError, match='2 of 10 images cannot be used, more than the 1'):
        train(cfg)


class PoisonedNorm(nn.LayerNorm):
    """Makes NaN of good input for a number of calls."""

    def __init__(self, *args, calls):
        super().__init__(*args)
        self.calls = calls

    def forward(self, x):
        self.calls -= 1
        return super().forward(x) * (float('nan') if self.calls >= 0 else 1.0)


def poison(runner, calls):
    norm = PoisonedNorm(64, calls=calls)
    norm.load_state_dict(runner.model.backbone.norm3.state_dict())
    runner.model.backbone.norm3 = norm


def test_loss_that_stays_bad_ends_the_run(folder, tmp_path):
    weights_before = {}

    def keep(runner):
        poison(runner, 100)
        weights_before.update({k: v.clone() for k, v in runner.model.state_dict().items()})

    AtIteration.actions = {1: keep}
    cfg = config(tmp_path, folder)
    runner = Runner.from_cfg(cfg)
    with pytest.raises(NonFiniteLossError) as error_info:
        runner.train()
    message = str(error_info.value)
    assert message.startswith('the loss is nan in iteration 5 (learning rate 0.001)')
    assert 'as in the 2 before it' in message and '\n' not in message
    assert 'first bad: module backbone.norm3 (PoisonedNorm)' in message
    named = message.partition('images: ')[2].split(', ')
    assert len(named) == BATCH and all(Path(path).parent == folder for path in named)
    # The bad steps have not reached the parameters.
    assert_same(runner.model.state_dict(), weights_before)


def test_two_bad_steps_are_left_out(folder, tmp_path):
    AtIteration.actions = {1: lambda runner: poison(runner, 2)}
    losses, final = train(config(tmp_path, folder))
    assert np.isnan([losses[2], losses[3]]).all()
    assert np.isfinite([v for k, v in losses.items() if k not in (2, 3)]).all()
    assert all(value.isfinite().all() for value in final.values())


class Scaler:
    """What a GPU's loss scaler does, from a scale that is much too large."""

    def __init__(self):
        self.value, self.left_out = 2.0**140, 0

    def scale(self, loss):
        return loss * self.value

    def step(self, optimizer):
        gradients = [p.grad for p in optimizer.param_groups[0]['params'] if p.grad is not None]
        torch._foreach_mul_(gradients, 1 / self.value)
        if all(gradient.isfinite().all() for gradient in gradients):
            optimizer.step()
        else:
            self.value /= 2**32
            self.left_out += 1

    def update(self, value):
        pass

    def state_dict(self):
        return {}


@OPTIM_WRAPPERS.register_module(force=True)
class MixedPrecision(AmpOptimWrapper):
    """mmengine's, which a CPU may have as well."""

    def __init__(self, **kwargs):
        OptimWrapper.__init__(self, **kwargs)
        self._scale_update_param, self.cast_dtype, self.loss_scaler = None, None, Scaler()


def test_steps_that_the_loss_scaler_leaves_out_are_no_bad_steps(folder, tmp_path, capfd):
    cfg = config(tmp_path, folder)
    cfg.optim_wrapper.type = 'mmengine.MixedPrecision'
    cfg.custom_hooks[2].max_bad_steps = 1
    cfg.experiment_name = 'mixed'
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.optim_wrapper.loss_scaler.left_out == 1
    assert sorted(AtIteration.losses) == list(range(3 * STEPS))
    assert 'left out' not in ''.join(capfd.readouterr())


def test_where_numbers_go_bad():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    x = torch.ones(1, 2)
    assert first_non_finite(model, lambda: model(x)) == ''
    assert first_non_finite(model, lambda: model(x).log() * float('nan')) == (
        'the loss itself, of outputs that are finite'
    )
    assert first_non_finite(model, lambda: model(x * float('inf'))) == 'module 0 (Linear)'
    with torch.no_grad():
        model[2].weight[0, 0] = float('nan')
    assert first_non_finite(model, lambda: model(x)) == 'parameter 2.weight'
    assert not any(module._forward_hooks for module in model.modules())


def test_gradient_norm_is_logged(folder, tmp_path):
    norms = []

    def measure(optimizer, args, kwargs):
        norms.append(
            sum(
                float((p.grad.double() ** 2).sum())
                for group in optimizer.param_groups
                for p in group['params']
                if p.grad is not None
            )
            ** 0.5
        )

    handle = register_optimizer_step_pre_hook(measure)
    cfg = config(tmp_path, folder, epochs=1)
    cfg.log_processor = dict(window_size=1)
    train(cfg)
    handle.remove()
    (file,) = tmp_path.glob('*/vis_data/scalars.json')
    logged = [json.loads(line)['grad_norm'] for line in file.read_text().splitlines()]
    assert logged == pytest.approx(norms, rel=1e-5) and len(logged) == STEPS
    half = [torch.full((3, 5), 100.0, dtype=torch.float16), torch.ones(4)]
    assert float(gradient_norm(half)) == pytest.approx((15 * 1e4 + 4) ** 0.5)
