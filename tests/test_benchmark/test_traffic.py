"""Traffic against counts made by hand; the lean path is what is counted."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from greenmim_mm.benchmark.candidates import Candidate, GreenMIMStep, mae, simmim
from greenmim_mm.benchmark.measure import kept_bytes
from greenmim_mm.benchmark.traffic import (
    Total,
    TrafficCounter,
    count_step,
    kept_in_step,
)
from greenmim_mm.compat import fakes_gather

MINI = dict(embed_dims=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))
MINI_VIT = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)


def count(function):
    """``{operator: (launches, flops, elements read, elements written)}`` of float32 work."""
    with TrafficCounter() as counter:
        function()
    found = {}
    for x in counter.launches:
        row = found.get(x.operator, (0, 0, 0, 0))
        more = (1, x.flops, x.read // 4, x.written // 4)
        found[x.operator] = tuple(a + b for a, b in zip(row, more, strict=True))
    return found


def test_linear():
    x, layer = torch.randn(5, 8, requires_grad=True), nn.Linear(8, 3)
    grad = torch.randn(5, 3)
    assert count(lambda: layer(x).backward(grad)) == {
        'addmm': (1, 2 * 5 * 8 * 3, 3 + 40 + 24, 15),
        # Of x: grad @ weight. Of the weight: grad.T @ x; transposing is a view.
        'mm': (2, 2 * 2 * 5 * 8 * 3, (15 + 24) + (15 + 40), 40 + 24),
        'sum': (1, 0, 15, 3),
    }


def test_layer_norm():
    x, norm = torch.randn(5, 8, requires_grad=True), nn.LayerNorm(8)
    grad = torch.randn(5, 8)
    assert count(lambda: norm(x).backward(grad)) == {
        'native_layer_norm': (1, 0, 40 + 8 + 8, 40 + 5 + 5),
        'native_layer_norm_backward': (1, 0, 40 + 40 + 5 + 5 + 8 + 8, 40 + 8 + 8),
    }


def test_softmax():
    x, grad = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)
    assert count(lambda: x.softmax(-1).backward(grad)) == {
        '_softmax': (1, 0, 40, 40),
        '_softmax_backward_data': (1, 0, 80, 40),
    }


@pytest.mark.parametrize(
    ('work', 'operator', 'read', 'written'),
    [
        (lambda x, y: x.add_(y), 'add_', 80, 40),  # in place: read and written
        (lambda x, y: x.copy_(y), 'copy_', 40, 40),  # what it replaces is not read
        (lambda x, y: x.index_copy_(0, torch.arange(5), y), 'index_copy_', 40 + 10, 40),
        (lambda x, y: x.zero_(), 'zero_', 0, 40),
        (lambda x, y: x.new_zeros(7), 'new_zeros', 0, 7),  # a dtype and a device, no value
        (lambda x, y: torch.ones_like(x), 'ones_like', 0, 40),
        (lambda x, y: x.index_fill_(1, torch.tensor([0, 3]), 0), 'index_fill_', 4, 10),
        (lambda x, y: torch.add(x, x, out=y), 'add', 40, 40),  # x is read once
        (lambda x, y: torch.mm(x, x.t()), 'mm', 40, 25),  # and so is its transpose
        (lambda x, y: x + y[:1].expand(5, 8), 'add', 40 + 8, 40),  # a row, however often
        (lambda x, y: x + y[0, 0], 'add', 40 + 1, 40),
        (lambda x, y: torch.addmm(x, y, torch.ones(8, 8), beta=0), 'addmm', 40 + 64, 40),
        (lambda x, y: x.index_select(0, torch.tensor([1])), 'index_select', 8 + 2, 8),
        (lambda x, y: torch.cat([x, y]), 'cat', 80, 80),
    ],
)
def test_bytes(work, operator, read, written):
    x, y = torch.randn(2, 5, 8)
    assert count(lambda: work(x, y))[operator][2:] == (read, written)


def test_views_and_allocations_are_free():
    x = torch.randn(4, 6)
    free = lambda: (x.t(), x.view(24), x[1:3], x.expand(2, 4, 6), torch.empty(9), x.unbind(0))  # noqa: E731
    assert count(free) == {}
    assert count(lambda: x.t().reshape(24)) == {'clone': (1, 0, 24, 24)}


class Tower(nn.Module):
    """A model whose parts have the names of a network's."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([MultiheadAttention(), FFN(), MAEPretrainDecoder()])

    def draw(self, images):
        assert isinstance(images, FakeTensor) or len(images) == 1

    def forward(self, images, drawn):
        for layer in self.layers:
            images = layer(images)
        return images.exp().sum()


class FFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return (x * self.scale).tanh()


class MultiheadAttention(FFN):
    def forward(self, x):
        return checkpoint(self.work, x, use_reentrant=False)

    def work(self, x):
        return super().forward(x).sigmoid()


class MAEPretrainDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = FFN()

    def forward(self, x):
        return self.inner(x).sin()


def test_the_backward_pass_belongs_to_the_part_of_the_forward_pass():
    parts = {}
    for launch in count_step(Tower(), (2, 3, 4, 4)):
        parts.setdefault(launch.operator, []).append(launch.part)
    assert parts['sigmoid_backward'] == ['attention']
    # Forward, then backward through the same layers; attention is computed once more.
    assert parts['tanh'] == ['MLP', 'MLP', 'decoder', 'MLP']
    assert parts['tanh_backward'] == ['decoder', 'MLP', 'MLP']
    assert parts['sin'] == parts['cos'] == ['decoder']
    assert parts['exp'] == ['']


needs_fakes = pytest.mark.skipif(
    not fakes_gather(), reason='fake tensors of this torch do not know index_select with out='
)


def green(**options):
    return GreenMIMStep(Candidate('mini', 'Mini', '', GreenMIMStep, MINI, options=options)).train()


@needs_fakes
def test_a_step_of_greenmim(monkeypatch):
    """The lean path, large batches at no cost, and the model left as it was."""
    model = green()
    before = {name: p.clone() for name, p in model.named_parameters()}
    told = []
    monkeypatch.setattr('greenmim_mm.models.lean._tell', told.append)
    launches = count_step(model, (4096, 3, 224, 224))
    assert told == []
    names = [launch.operator for launch in launches]
    assert names.count('gelu') == 2 * 8 + 1  # again in the backward pass; the decoder's once
    assert {'attention', 'MLP', 'norm', 'merging', 'embedding', 'residual', 'planning', 'decoder',
            'loss'} <= {launch.part for launch in launches}  # fmt: skip
    assert sum(launch.moved for launch in launches if launch.part == '') < 1e-3 * sum(
        launch.moved for launch in launches
    )
    for name, p in model.named_parameters():
        assert p.grad is None and type(p) is nn.Parameter
        torch.testing.assert_close(p, before[name], rtol=0, atol=0)
    assert not hasattr(type(model).masked_loss, '__wrapped__')


@needs_fakes
def test_fake_tensors_count_as_real_ones_do():
    fake, real = green(), green()
    images = torch.randn(2, 3, 224, 224)
    real(images, None)  # tables are made, and a mask is drawn, as before counting
    with TrafficCounter() as counter:
        real(images, real.draw(images)).backward()
    assert [(x.operator, x.flops, x.read, x.written) for x in counter.launches] == [
        (x.operator, x.flops, x.read, x.written)
        for x in count_step(fake, images.shape, kernels='cpu')
    ]


@needs_fakes
def test_kernels_of_cuda():
    """One fused operator a block each way, and no attention weight in memory; put back after."""
    plain = torch.nn.functional.scaled_dot_product_attention
    images = (64, 3, 224, 224)
    names = [launch.operator for launch in count_step(green(), images)]
    fused = '_scaled_dot_product_efficient_attention'
    assert names.count(fused) == names.count(f'{fused}_backward') == 8
    assert '_softmax' not in names and 'baddbmm' not in names
    assert torch.nn.functional.scaled_dot_product_attention is plain
    cuda, cpu = (
        Total.of(count_step(green(), images, kernels=kernels)) for kernels in ('cuda', 'cpu')
    )
    assert cuda.moved < cpu.moved and cuda.launches < cpu.launches
    # Products of the scores once more in the kernel's backward pass, as in ours.
    assert cuda.flops == pytest.approx(cpu.flops, rel=0.02)


@needs_fakes
def test_what_is_kept_is_what_the_real_step_keeps():
    model, images = green(), (2, 3, 224, 224)
    batch = torch.randn(images)
    model(batch[:1], None)
    kept = kept_bytes(lambda: model(batch), model)
    assert kept_in_step(green(), images, kernels='cpu') == pytest.approx(kept, rel=1e-3)
    # The fused kernel keeps its output as well; who recomputes nothing keeps most.
    fused = kept_in_step(green(), images)
    assert kept < fused < kept_in_step(green(recompute=False), images)


@pytest.mark.parametrize(
    ('build', 'arch', 'side', 'parts'),
    [
        (simmim, MINI, 192, {'attention', 'MLP', 'norm', 'merging', 'embedding', 'decoder'}),
        (mae, MINI_VIT, 224, {'attention', 'MLP', 'norm', 'embedding', 'decoder'}),
    ],
)
def test_peers(build, arch, side, parts):
    model = build(Candidate('peer', 'Mini', '', build, arch, side, 6)).train()
    launches = count_step(model, (2, 3, side, side))
    assert parts | {'loss', 'residual'} <= {launch.part for launch in launches}
    products = sum(x.flops for x in launches if x.part in ('attention', 'MLP', 'decoder'))
    assert products > 0.8 * sum(x.flops for x in launches)
