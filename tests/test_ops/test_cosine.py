"""Cosine attention of Swin V2: lengths and scales, against ``F.normalize``."""

import math

import pytest
import torch
from torch.nn import functional as F

from greenmim_mm.ops import cosine_scale
from greenmim_mm.ops.cosine import ScaledInPlace, scaled_queries_and_keys

HEADS, CHANNELS = 3, 8


def plain(x, scale):
    """``(B, heads, slots, d)``, normalised, times a number for each head."""
    return F.normalize(x, dim=-1) * scale[:, None, None]


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    x = torch.randn(2, HEADS, 5, CHANNELS, dtype=torch.float64)
    x[0, :, 0] = 0  # a query of length zero
    return x.requires_grad_(), torch.tensor([0.5, 1.0, 9.0]).double().requires_grad_()


@pytest.mark.parametrize('rows', [False, True])
def test_scaled_in_place(inputs, rows):
    """In both layouts; what is written over is neither a leaf nor a view, as after a gather."""
    x, scale = inputs

    def ours(x):
        if rows:
            x = x.transpose(1, 2).flatten(2)[:, None]
        y, _ = ScaledInPlace.apply(x * 1, scale)
        return y[:, 0].unflatten(2, (HEADS, -1)).transpose(1, 2) if rows else y

    out, expected = ours(x), plain(x, scale)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    weight[0, :, 0] = 0  # the derivative at zero is huge and of no use
    grads = torch.autograd.grad(out, inputs, weight)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, inputs, weight))

    def second(function):
        out = function(x[:, :, 1:])
        grads = torch.autograd.grad(out.pow(3).sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)

    torch.testing.assert_close(second(ours), second(lambda x: plain(x, scale)))


def test_only_the_factors_get_a_gradient(inputs):
    x, scale = inputs
    _, factor = ScaledInPlace.apply(x * 1, scale)
    weight = torch.randn_like(factor)
    weight[0, :, 0] = 0
    expected = scale[:, None, None] / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(factor, x, weight),
        torch.autograd.grad(expected, x, weight[..., None].view_as(expected)),
    )


def test_queries_carry_the_scale(inputs):
    x, scale = inputs
    x = x.transpose(1, 2)
    q, k = scaled_queries_and_keys(x, x, scale)
    torch.testing.assert_close(q, F.normalize(x, dim=-1) * scale[:, None] * CHANNELS**0.5)
    torch.testing.assert_close(k, F.normalize(x, dim=-1))


def test_scale_is_clamped_and_wide():
    logit_scale = torch.tensor([1.0, 4.0, 9.0], dtype=torch.bfloat16).view(3, 1, 1)
    logit_scale.requires_grad_()
    scale = cosine_scale(logit_scale)
    assert scale.dtype == torch.float32 and scale.shape == (3,)
    torch.testing.assert_close(scale, torch.tensor([math.e, math.e**4, 100.0]))
    (grad,) = torch.autograd.grad(scale.sum(), logit_scale)
    assert grad.flatten()[2] == 0
