"""Steps in parts: the same update as the whole batch, and what happens without memory."""

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from greenmim_mm.engine import loops
from greenmim_mm.engine.loops import MicroBatchTrainLoop, OutOfMemoryError, split_batch


class Line(BaseModel):
    """Mean squared output of a linear map; it 'runs out of memory' above ``most`` images."""

    def __init__(self, most=100):
        super().__init__()
        self.layer = nn.Linear(3, 2).double()
        nn.init.constant_(self.layer.weight, 0.3)
        nn.init.constant_(self.layer.bias, -0.2)
        self.most, self.sizes = most, []

    def forward(self, inputs, mode):
        self.sizes.append(len(inputs))
        if len(inputs) > self.most:
            raise torch.cuda.OutOfMemoryError('CUDA out of memory')
        return dict(loss=self.layer(inputs).square().mean())


def data():
    generator = torch.Generator().manual_seed(0)
    return [dict(inputs=torch.randn(3, generator=generator).double()) for _ in range(8)]


def train(tmp_path, accumulate, most=100, batch=8):
    model = Line(most)
    loop = dict(type='greenmim_mm.MicroBatchTrainLoop', max_epochs=2, accumulate=accumulate)
    runner = Runner(
        model,
        str(tmp_path / f'{accumulate}_{most}'),
        train_dataloader=DataLoader(data(), batch),
        train_cfg=loop,
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9)),
        default_hooks=dict(checkpoint=None, logger=None),
        custom_hooks=[dict(type='greenmim_mm.NonFiniteLossHook')],
        experiment_name=f'{tmp_path.name}_{accumulate}_{most}',
    )
    runner.train()
    assert runner.iter == 2 * (8 // batch)
    return runner


@pytest.mark.parametrize('accumulate', [2, 4, 8, 100])
def test_parts_give_the_update_of_the_whole(tmp_path, accumulate):
    whole = train(tmp_path, 1).model.layer
    runner = train(tmp_path, accumulate)
    torch.testing.assert_close(runner.model.layer.weight, whole.weight, rtol=1e-12, atol=1e-14)
    assert set(runner.model.sizes) == {max(8 // accumulate, 1)}


def test_lack_of_memory_halves_until_it_fits(tmp_path):
    whole = train(tmp_path, 1).model.layer
    runner = train(tmp_path, 1, most=2)
    assert runner.train_loop.accumulate == 4
    assert runner.model.sizes == [8, 4, *[2] * 8]
    torch.testing.assert_close(runner.model.layer.weight, whole.weight, rtol=1e-12, atol=1e-14)


def test_not_even_one_image(tmp_path):
    with pytest.raises(OutOfMemoryError, match='no memory for a single image'):
        train(tmp_path, 1, most=0)


def test_several_processes_are_told_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(loops, 'is_distributed', lambda: True)
    with pytest.raises(OutOfMemoryError, match='--resume --accumulate 4') as info:
        train(tmp_path, 2, most=2)
    assert info.value.accumulate == 2


def test_a_bad_part_spoils_its_step_alone(tmp_path, monkeypatch):
    forward, calls = Line.forward, []

    def sometimes_bad(self, inputs, mode):
        calls.append(1)
        loss = forward(self, inputs, mode)['loss']
        return dict(loss=loss * float('nan') if len(calls) == 2 else loss)

    monkeypatch.setattr(Line, 'forward', sometimes_bad)
    spoilt = train(tmp_path, 4).model.layer.weight
    monkeypatch.setattr(Line, 'forward', forward)
    # The first of two steps is left out.
    once = Line()
    batch = torch.stack([item['inputs'] for item in data()])
    once.layer(batch).square().mean().backward()
    torch.testing.assert_close(spoilt, once.layer.weight - 0.1 * once.layer.weight.grad)


def test_split_batch_keeps_everything():
    batch = dict(inputs=torch.arange(7), data_samples=list('abcdefg'))
    parts = split_batch(batch, 3)
    assert [len(part['inputs']) for part in parts] == [2, 2, 3]
    assert torch.cat([part['inputs'] for part in parts]).tolist() == list(range(7))
    assert sum((part['data_samples'] for part in parts), []) == list('abcdefg')


def test_accumulate_must_be_positive():
    with pytest.raises(ValueError, match='accumulate=0'):
        MicroBatchTrainLoop(None, None, 1, accumulate=0)
