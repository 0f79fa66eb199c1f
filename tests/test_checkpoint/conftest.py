"""A checkpoint as mmengine writes it."""

import pytest
import torch
from mmengine.runner import Runner
from runner_files import tiny_model
from torch.utils.data import DataLoader, Dataset


class RandomImages(Dataset):
    metainfo = {'classes': ('a', 'b')}

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return dict(inputs=torch.rand(3, 64, 64), data_samples=0)


@pytest.fixture(scope='session')
def runner_file(tmp_path_factory):
    """What mmengine's Runner writes after an epoch, with schedules, logs and optimizer."""
    folder = tmp_path_factory.mktemp('run')
    runner = Runner(
        model=tiny_model(),
        work_dir=str(folder),
        train_dataloader=DataLoader(RandomImages(), batch_size=1),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3)),
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.1, begin=0, end=1),
            dict(type='MultiStepLR', milestones=[1, 2]),
        ],
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1)),
        experiment_name='test_files',
    )
    runner.train()
    return folder / 'epoch_1.pth'
