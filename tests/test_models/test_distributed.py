"""Two processes with gloo: one model, gradients averaged, masks of their own."""

import os
import socket

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.logging import MessageHub
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from test_greenmim import CONFIG

from greenmim_mm.models import GreenMIM


def train(rank: int, port: int, folder: str) -> None:
    """A training step of one process; writes its mask, gradients and parameters."""
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=2)
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
    for _ in range(2):
        losses = wrapped.train_step(dict(inputs=images, data_samples=None), optimizer)
        assert losses['loss'].isfinite()
    parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.save(
        dict(masks=np.stack([mask.hidden for mask in masks]).tolist(), parameters=parameters),
        f'{folder}/{rank}.pth',
    )
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    mp.spawn(train, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f'{rank}.pth') for rank in (0, 1))
    assert torch.equal(first['parameters'], second['parameters'])
    assert len({tuple(mask) for run in (first, second) for mask in run['masks']}) == 4
    torch.testing.assert_close(first['parameters'], alone(first['masks'], second['masks']))


def alone(*masks: list[list[bool]]) -> torch.Tensor:
    """The same two steps by one process, which averages the gradients itself."""
    torch.manual_seed(0)
    model = GreenMIM(**CONFIG, data_preprocessor=dict(type='SelfSupDataPreprocessor'))
    model.init_weights()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(2):
        optimizer.zero_grad()
        for rank in range(2):
            images = torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(rank))
            loss = model.masked_loss(images, np.array(masks[rank][step]))
            (loss / 2).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])
