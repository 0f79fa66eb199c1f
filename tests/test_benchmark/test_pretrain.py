"""Steps in training, and the batches that fit."""

import pytest
import torch
from torch import nn

from greenmim_mm.benchmark import pretrain
from greenmim_mm.benchmark.candidates import Candidate, GreenMIMStep
from greenmim_mm.benchmark.measure import Settings
from greenmim_mm.compat import compiles_plans

CPU = torch.device('cpu')
MINI = dict(embed_dims=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))


class Small(nn.Module):
    """Fits up to ``most`` images; remembers what it was called with."""

    def __init__(self, candidate):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.most = candidate.options['most']
        self.drawn = 0
        self.seen = candidate.options.setdefault('seen', [])

    def draw(self, images):
        self.drawn += 1
        return self.drawn

    def forward(self, images, drawn):
        if len(images) > self.most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        self.seen.append(drawn)
        return self.weight * images.mean()


def small(name, most):
    return Candidate(name, 'Small', name, Small, {}, 32, options=dict(most=most))


def test_the_largest_batch_is_found_and_leaves_no_trace():
    results = []
    candidates = [small('nine', 9), small('none', 0), small('two', 2)]
    settings = Settings(CPU, repeats=1)
    pretrain.run(candidates, results, lambda line: None, settings, batch=2, find_batch=True)
    assert [result.largest_batch for result in results] == [9, 0, 2]
    assert [result.failure for result in results] == ['', 'out of memory at batch 2', '']
    assert [len(result.seconds) for result in results] == [1, 0, 1]


def test_each_step_gets_what_was_drawn_for_it():
    candidate = small('one', 99)
    trainer = pretrain.Trainer(candidate, 3, Settings(CPU, steps=4))
    assert trainer.turn() > 0
    assert candidate.options['seen'] == [1, 2, 3, 4]
    assert trainer.planning_ms() is None


def test_a_step_trains_and_leaves_no_gradient():
    trainer = pretrain.Trainer(
        Candidate('green', 'G', 'Green', GreenMIMStep, MINI), 2, Settings(CPU)
    )
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.step(None)
    after = list(trainer.model.parameters())
    assert all(p.grad is None for p in after)
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert all(changed)
    assert trainer.images.shape == (2, 3, 224, 224)
    assert trainer.planning_ms(repeats=1) > 0
    assert trainer.update_ms(repeats=1) > 0
    assert all(p.grad is None for p in trainer.model.parameters())


def test_without_a_fused_update_the_plain_one_is_taken(monkeypatch):
    plain = torch.optim.AdamW

    def refuse(*args, fused=False, **kwargs):
        if fused:
            raise RuntimeError('fused=True needs CUDA')
        return plain(*args, **kwargs)

    parameters = [nn.Parameter(torch.ones(2))]
    # torch 2.1 has no fused one on a CPU.
    assert pretrain.adamw(parameters).defaults['fused'] or not compiles_plans()
    monkeypatch.setattr(torch.optim, 'AdamW', refuse)
    assert not pretrain.adamw(parameters).defaults['fused']


@pytest.mark.parametrize('amp', [False, True])
def test_autocast_is_used_if_asked_for(amp):
    trainer = pretrain.Trainer(small('one', 9), 1, Settings(CPU, amp=amp))
    trainer.model.forward = lambda images, drawn: torch.ones(2, 2) @ torch.ones(2, 2)
    assert trainer.loss(None).dtype == (torch.bfloat16 if amp else torch.float32)
