"""Layer pairs with recomputation against the plain layers, and what they keep."""

import pytest
import torch
from torch.nn import functional as F

from greenmim_mm.ops import gelu_linear, norm_linear


def tensors(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes
    ]


def check(ours, theirs, inputs, **tolerance):
    out, expected = ours(*inputs), theirs(*inputs)
    torch.testing.assert_close(out, expected, **tolerance)
    weight = torch.randn_like(out)
    inputs = [x for x in inputs if isinstance(x, torch.Tensor)]
    grads = torch.autograd.grad((out * weight).sum(), inputs)
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, **tolerance)


@pytest.mark.parametrize('with_bias', [True, False])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_norm_linear(with_bias, dtype):
    x, scale, offset, weight, bias = tensors((2, 5, 8), 8, 8, (12, 8), 12, dtype=dtype)
    check(
        lambda *a: norm_linear(a[0], a[1], a[2], 1e-6, *a[3:]),
        lambda *a: F.linear(F.layer_norm(a[0], (8,), a[1], a[2], 1e-6), *a[3:]),
        [x, scale, offset, weight, bias if with_bias else None],
    )


@pytest.mark.parametrize('with_bias', [True, False])
def test_gelu_linear(with_bias):
    x, weight, bias = tensors((2, 5, 8), (12, 8), 12)
    check(
        gelu_linear,
        lambda x, *rest: F.linear(F.gelu(x), *rest),
        [x, weight, bias if with_bias else None],
    )


@pytest.mark.parametrize('with_bias', [True, False])
def test_second_derivatives(with_bias):
    """Gradients of gradients, each result depending on several inputs at once."""
    x, scale, offset, weight, bias = tensors((5, 4), 4, 4, (3, 4), 3)
    inputs = [x, scale, offset, weight] + [bias] * with_bias
    bias = bias if with_bias else None

    def second(norm, gelu):
        out = gelu(norm().square() * x.sum(), weight.t())
        grads = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    ours = second(
        lambda: norm_linear(x, scale, offset, 1e-6, weight, bias),
        lambda y, w: gelu_linear(y, w, offset),
    )
    theirs = second(
        lambda: F.linear(F.layer_norm(x, (4,), scale, offset, 1e-6), weight, bias),
        lambda y, w: F.linear(F.gelu(y), w, offset),
    )
    torch.testing.assert_close(ours, theirs)


def test_frozen_parameters_get_no_gradient():
    """As with frozen stages; the input's gradient is still right."""
    x, scale, offset, weight, bias = tensors((3, 8), 8, 8, (4, 8), 4)
    for parameter in (scale, offset, weight, bias):
        parameter.requires_grad_(False)
    norm_linear(x, scale, offset, 1e-5, weight, bias).sum().backward()
    (expected,) = torch.autograd.grad(
        F.linear(F.layer_norm(x, (8,), scale, offset), weight, bias).sum(), x
    )
    torch.testing.assert_close(x.grad, expected)
    assert weight.grad is None and scale.grad is None
    x = x.detach()
    weight.requires_grad_(True)
    gelu_linear(x, weight, bias).sum().backward()
    torch.testing.assert_close(weight.grad, F.gelu(x).sum(0).expand(4, -1))


def test_autocast():
    """Results and dtypes of the plain layers under bfloat16."""
    x, scale, offset, weight, bias = tensors((6, 8), 8, 8, (12, 8), 12, dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        check(
            lambda *a: norm_linear(a[0], a[1], a[2], 1e-5, *a[3:]),
            lambda *a: F.linear(F.layer_norm(a[0], (8,), a[1], a[2], 1e-5), *a[3:]),
            [x, scale, offset, weight, bias],
            rtol=0.03,
            atol=0.03,
        )
        y = norm_linear(x, scale, offset, 1e-5, weight, bias)
        assert y.dtype == torch.bfloat16
        assert gelu_linear(y, weight.t(), None).dtype == torch.bfloat16
    (y.float().sum()).backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


def test_what_is_kept():
    """The input and the statistics of the norm; not its result, nor GELU's."""
    x, scale, offset, weight, bias = tensors((64, 8), 8, 8, (32, 8), 32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = norm_linear(x, scale, offset, 1e-5, weight, bias)
        gelu_linear(y, weight.t(), None)
    large = {t.untyped_storage().data_ptr() for t in kept if t.numel() >= 64 * 8}
    assert large == {x.untyped_storage().data_ptr(), y.untyped_storage().data_ptr()}
