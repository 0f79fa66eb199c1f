"""Layer pairs that keep one activation for the backward pass where autograd would keep two.

A linear layer keeps its input for the gradient of its weight. Where that input is a pointwise
function of something that is kept anyway, it is cheaper to compute it again: LayerNorm before the
projections, GELU inside the MLP. Results are those of the plain layers, and where a custom
autograd function would be in the way (:func:`recompute_obstacle`) the plain layers are used.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from ..compat import autocast_dtype, is_compiling


def recompute_obstacle() -> str | None:
    """What goes on just now that custom autograd functions do not survive; None if nothing."""
    if is_compiling():  # True inside torch.export as well
        return 'torch.compile or torch.export'
    if torch.jit.is_tracing():
        return 'torch.jit.trace'
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return 'a transform of torch.func'
    if torch.autograd.forward_ad._current_level >= 0:
        return 'forward-mode differentiation'
    return None


def differentiable_gradients(
    plain: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    grad: Tensor,
) -> list[Tensor | None]:
    """Gradients that can be differentiated again, for a backward pass with ``create_graph``.

    Args:
        plain: The function written with operators that autograd knows.
        inputs: Its arguments.
        needed: Which of them want a gradient.
        grad: Gradient of the result.
    """
    # Behind an alias the graph ends: an input may itself depend on another one.
    inputs = [x.view_as(x) if need else x for x, need in zip(inputs, needed, strict=True)]
    out = plain(*inputs)
    wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return [next(found) if need else None for need in needed]


def compute_dtype(x: Tensor) -> torch.dtype:
    """dtype that autocast gives to a linear layer on ``x``, or that of ``x`` outside of it."""
    kind = x.device.type
    if kind == 'meta':
        return x.dtype
    casts = x.is_floating_point() and x.dtype != torch.float64
    return (autocast_dtype(kind) if casts else None) or x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Autocast off for the device of ``x``; the meta device knows no autocast."""
    kind = x.device.type
    return nullcontext() if kind == 'meta' else torch.autocast(kind, enabled=False)


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """``linear(layer_norm(x))``; the normalised tokens are not kept.

    Args:
        x: ``(..., C)``.
        norm_weight: ``(C,)`` scale of the LayerNorm.
        norm_bias: ``(C,)`` offset of the LayerNorm.
        eps: Epsilon of the LayerNorm.
        weight: ``(D, C)``.
        bias: ``(D,)`` or None.

    Returns:
        ``(..., D)``, in autocast's dtype inside autocast.
    """
    if recompute_obstacle():
        return _plain_norm_linear(x, norm_weight, norm_bias, weight, bias, eps)
    dtype = compute_dtype(x)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    with without_autocast(x):
        return _NormLinear.apply(x, norm_weight, norm_bias, weight, bias, eps)


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``linear(gelu(x))``; the activated tokens are not kept.

    Args:
        x: ``(..., C)``.
        weight: ``(D, C)``.
        bias: ``(D,)`` or None.

    Returns:
        ``(..., D)``, in autocast's dtype inside autocast.
    """
    if recompute_obstacle():
        return _plain_gelu_linear(x, weight, bias)
    dtype = compute_dtype(x)
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with without_autocast(x):
        return _GeluLinear.apply(x, weight, bias)


def _plain_norm_linear(x, norm_weight, norm_bias, weight, bias, eps):
    normed = F.layer_norm(x.to(norm_weight.dtype), norm_weight.shape, norm_weight, norm_bias, eps)
    return F.linear(normed.to(weight.dtype), weight, bias)


def _plain_gelu_linear(x, weight, bias):
    return F.linear(F.gelu(x), weight, bias)


class _NormLinear(torch.autograd.Function):
    """LayerNorm in the dtype of its parameters, then the linear layer in the dtype of its own."""

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, weight, bias, eps):
        ctx.eps = eps
        normed, mean, rstd = _normalise(x, norm_weight, norm_bias, eps)
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, bias, mean, rstd)
        return F.linear(normed.to(weight.dtype), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, norm_weight, norm_bias, weight, bias, mean, rstd = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():
            inputs = x, norm_weight, norm_bias, weight, bias
            plain = lambda *inputs: _plain_norm_linear(*inputs, ctx.eps)  # noqa: E731
            return *differentiable_gradients(plain, inputs, needed[:5], grad), None
        normed, *_ = _normalise(x, norm_weight, norm_bias, ctx.eps)
        linear_grads = _linear_gradients(needed[3:5], grad, normed.to(weight.dtype))
        grad_x, *norm_grads = torch.ops.aten.native_layer_norm_backward(
            (grad @ weight).to(norm_weight.dtype),
            x.to(norm_weight.dtype),
            norm_weight.shape,
            mean,
            rstd,
            norm_weight,
            norm_bias,
            list(needed[:3]),
        )
        return None if grad_x is None else grad_x.to(x.dtype), *norm_grads, *linear_grads, None


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight, bias)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias = inputs = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return (*differentiable_gradients(_plain_gelu_linear, inputs, needed, grad),)
        linear_grads = _linear_gradients(needed[1:], grad, F.gelu(x) if needed[1] else x)
        grad_x = None
        if needed[0]:
            grad_x = torch.ops.aten.gelu_backward(grad @ weight, x)
        return grad_x, *linear_grads


def _linear_gradients(
    needed: tuple[bool, bool], grad: Tensor, x: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a linear layer's weight and bias; ``x`` is its input."""
    grad = grad.reshape(-1, grad.shape[-1])
    grad_weight = grad.t() @ x.reshape(-1, x.shape[-1]) if needed[0] else None
    grad_bias = grad.sum(0) if needed[1] else None
    return grad_weight, grad_bias


def _normalise(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm in the dtype of its parameters: tokens, means and inverse deviations."""
    return torch.native_layer_norm(x.to(weight.dtype), weight.shape, weight, bias, eps)
