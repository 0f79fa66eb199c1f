"""Measuring: statistics, turns, bytes kept, memory that does not suffice."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from greenmim_mm.benchmark import measure
from greenmim_mm.benchmark.measure import (
    Result,
    is_out_of_memory,
    kept_bytes,
    largest_batch,
    memory_limit,
    speedup,
    take_turns,
)


def test_rates_are_medians_of_images_per_second():
    ours = Result('a', 'A', 'G', 8, seconds=[2.0, 1.0, 4.0])
    theirs = Result('b', 'B', 'G', 4, seconds=[1.0, 4.0])
    assert ours.rate == (4.0, 2.0, 8.0)
    assert theirs.rate == (2.5, 1.0, 4.0)  # of images/s, not of seconds
    assert speedup(ours, theirs) == 4.0 / 2.5
    assert speedup(ours, Result('c', 'C', 'G', 1)) is None


def test_candidates_take_turns_and_one_without_memory_is_left_out():
    order = []
    results = [Result(name, name, 'G', 1) for name in 'abc']

    def turn(result):
        order.append(result.name)
        if result.name == 'b' and order.count('b') == 2:
            raise MemoryError
        return float(len(order))

    lines = []
    turns = [(result, lambda result=result: turn(result)) for result in results]
    take_turns(turns, 3, lines.append)
    assert order == [*'abc', *'abc', *'ac']
    assert [result.seconds for result in results] == [[1, 4, 7], [2], [3, 6, 8]]
    assert [result.failure for result in results] == ['', 'out of memory at batch 1', '']
    assert len(lines) == 7


def test_other_errors_are_not_taken_for_missing_memory():
    def turn():
        raise RuntimeError('mat1 and mat2 shapes cannot be multiplied')

    with pytest.raises(RuntimeError, match='mat1'):
        take_turns([(Result('a', 'A', 'G', 1), turn)], 1, print)


def test_steps_on_cuda_are_timed_between_synchronisations(monkeypatch):
    calls = []
    clock = iter([10.0, 16.0])
    monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: calls.append('empty'))
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda device: calls.append('wait'))
    monkeypatch.setattr(measure.time, 'perf_counter', lambda: calls.append('clock') or next(clock))
    seconds = measure.time_steps(lambda: calls.append('step'), 2, torch.device('cuda'))
    assert calls == ['empty', 'step', 'wait', 'clock', 'step', 'step', 'wait', 'clock']
    assert seconds == 3.0


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, extra):
        ctx.save_for_backward(x)
        ctx.extra = extra
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad, None


@dataclass
class _Extra:
    index: torch.Tensor


class _Small(nn.Module):
    """Images (2, 3) float32; what is saved is counted by hand in the test."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 5)
        self.register_buffer('scale', torch.rand(2, 5))

    def forward(self, x):
        y = self.linear(x)  # saves x: 2 x 3, and the weight: a parameter
        y = y.sigmoid()  # saves its result: 2 x 5
        y = y * self.scale  # saves the scale: a buffer. It would save y for a scale with gradient
        wide = y.repeat(1, 2)  # 2 x 10, saves nothing itself
        y = wide[:, :5] * wide[:, 5:]  # saves two views: all of wide, once
        return _Square.apply(y, _Extra(torch.zeros(7, dtype=torch.int64))).sum()  # saves y: 2 x 5


def test_kept_bytes_are_those_counted_by_hand():
    model, x = _Small(), torch.rand(2, 3)
    floats = 2 * 3 + 2 * 5 + 2 * 10 + 2 * 5
    assert kept_bytes(lambda: model(x), model) == 4 * floats + 8 * 7


def test_nothing_is_kept_for_what_has_no_gradient():
    model, x = nn.Linear(3, 5).requires_grad_(False), torch.rand(2, 3)
    assert kept_bytes(lambda: model(x), model) == 0


@pytest.mark.parametrize('most', [0, 1, 2, 5, 8, 100, 1000, 1 << 20])
def test_largest_batch_is_found_to_an_eighth(most):
    tried = []
    found = largest_batch(lambda batch: tried.append(batch) or batch <= most)
    assert found <= most
    if most < 1 << 16:
        assert most - found <= found / 8
        assert len(tried) <= 2 + 2 * math.log2(most + 2) + 3
    else:
        assert found == 1 << 16


@pytest.mark.parametrize(
    ('error', 'expected'),
    [
        (MemoryError(), True),
        (torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB'), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."), True),
        (RuntimeError('could not create a memory object'), True),
        (RuntimeError('expected scalar type Float'), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_errors_that_mean_missing_memory(error, expected):
    assert is_out_of_memory(error) == expected


def test_an_allocation_over_the_limit_fails_and_can_be_caught():
    size = 1 << 31  # much more than what earlier tests may give back meanwhile
    with memory_limit(size // 16):
        with pytest.raises(RuntimeError) as caught:
            torch.empty(size, dtype=torch.uint8)
        assert is_out_of_memory(caught.value)
    torch.empty(size, dtype=torch.uint8)
    with memory_limit(None):
        torch.empty(size, dtype=torch.uint8)
    assert measure.available_memory() > 0
