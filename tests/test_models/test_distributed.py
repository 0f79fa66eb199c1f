"""Processes with gloo: one model, gradients averaged, masks of their own."""

import os
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.logging import MessageHub
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from test_greenmim import CONFIG

from greenmim_mm.models import GreenMIM

STEPS = 3


def train(rank: int, port: int, folder: str, count: int) -> None:
    """Training steps of one process; writes its mask, gradients and parameters."""
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=count)
    MessageHub.get_current_instance().update_info_dict(dict(seed=0, iter=7))
    torch.manual_seed(0)
    model = GreenMIM(**CONFIG, data_preprocessor=dict(type='SelfSupDataPreprocessor'))
    model.init_weights()
    masks = []
    draw = model.draw_mask
    model.draw_mask = lambda grid: masks.append(draw(grid)) or masks[-1]
    # Without find_unused_parameters: a parameter without gradient would stop the second step.
    wrapped = MMDistributedDataParallel(model)
    optimizer = OptimWrapper(torch.optim.SGD(model.parameters(), 0.1))
    images = torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(rank))
    for _ in range(STEPS):
        losses = wrapped.train_step(dict(inputs=images, data_samples=None), optimizer)
        assert losses['loss'].isfinite()
    parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.save(
        dict(masks=np.stack([mask.hidden for mask in masks]).tolist(), parameters=parameters),
        f'{folder}/{rank}.pth',
    )
    dist.destroy_process_group()


@pytest.mark.parametrize('count', [2, 3])
def test_processes(tmp_path, count):
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    mp.spawn(train, (port, str(tmp_path), count), nprocs=count)
    runs = [torch.load(tmp_path / f'{rank}.pth') for rank in range(count)]
    for run in runs[1:]:
        assert torch.equal(run['parameters'], runs[0]['parameters'])
    # A mask for each process and step, one for all images in it: as_unit_mask takes no other.
    assert len({tuple(mask) for run in runs for mask in run['masks']}) == count * STEPS
    torch.testing.assert_close(runs[0]['parameters'], alone([run['masks'] for run in runs]))


def alone(masks: list[list[list[bool]]]) -> torch.Tensor:
    """The same steps by one process, which averages the gradients itself."""
    torch.manual_seed(0)
    model = GreenMIM(**CONFIG, data_preprocessor=dict(type='SelfSupDataPreprocessor'))
    model.init_weights()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank, mine in enumerate(masks):
            images = torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(rank))
            loss = model.masked_loss(images, np.array(mine[step]))
            (loss / len(masks)).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])
