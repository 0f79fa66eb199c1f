"""On a GPU: the results of the CPU, no wait for the device, half precision.

One test needs no GPU: on fake tensors an operation whose result decides what comes next fails,
and those are what makes a forward pass wait for the device.
"""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from greenmim_mm.compat import fakes_gather
from greenmim_mm.models import GreenSwin, GreenSwinV2
from greenmim_mm.ops import random_mask

ARCH = dict(embed_dims=32, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))
GRID = (8, 8)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')


def make(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == 'v1':
        model = GreenSwin(ARCH, window_size=7, drop_path_rate=0.0)
    else:
        arch = dict(ARCH, extra_norm_every_n_blocks=0)
        model = GreenSwinV2(arch, window_size=8, drop_path_rate=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def draw():
    mask = random_mask(64, 0.75, np.random.default_rng(0))
    images = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    return images, mask


def fake_pass(model, images, mask):
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = model(images, mask)
        out.square().sum().backward()
        maps = model(images)
    return out, maps


@pytest.mark.skipif(not fakes_gather(), reason='fake tensors of torch 2.1 gather into no result')
@pytest.mark.parametrize('name', ['v1', 'v2'])
def test_no_operation_depends_on_values(name):
    model, (images, mask) = make(name), draw()
    model(images)  # dense plans are kept: they are made once
    out, maps = fake_pass(model, images, mask)
    assert out.shape == (2, 16, 256) and maps[0].shape == (2, 256, 8, 8)


def test_an_operation_that_depends_on_values_is_noticed():
    model, (images, mask) = make('v1'), draw()
    forward = model.stages[0].forward
    model.stages[0].forward = lambda x, plans: forward(x * float(x.max() > 0), plans)
    with pytest.raises(DataDependentOutputException):
        fake_pass(model, images, mask)


@needs_gpu
@pytest.mark.parametrize('name', ['v1', 'v2'])
def test_cuda_equals_cpu(name):
    model, (images, mask) = make(name), draw()
    expected = model(images, mask)
    expected.square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model = make(name).cuda()
    out = model(images.cuda(), mask)
    out.square().sum().backward()
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-3, atol=1e-3)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        error = (parameter.grad.cpu() - gradient).norm() / gradient.norm().clamp_min(1e-6)
        assert error < 1e-2


@needs_gpu
@pytest.mark.parametrize('name', ['v1', 'v2'])
def test_no_pass_waits_for_the_device(name):
    model, (images, mask) = make(name).cuda(), draw()
    images = images.cuda()
    model(images, mask).sum().backward()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode('error')
    try:
        model(images, mask[::-1].copy()).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@needs_gpu
@pytest.mark.parametrize('name', ['v1', 'v2'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype):
    model, (images, mask) = make(name).cuda(), draw()
    images = images.cuda()
    expected = model(images, mask)
    with torch.autocast('cuda', dtype):
        out = model(images, mask)
    out.float().square().mean().backward()
    error = (out.float() - expected).norm() / expected.norm()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.01)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
