"""Training runs of a GreenMIM so small that an epoch takes a second."""

import os
import signal

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from greenmim_mm.engine.checkpoints import last_checkpoint

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


def interrupt_at(iteration, number=signal.SIGTERM):
    AtIteration.actions = {iteration: lambda runner: os.kill(os.getpid(), number)}
