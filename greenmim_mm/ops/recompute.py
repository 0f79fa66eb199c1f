"""Layer pairs that keep one activation for the backward pass where autograd would keep two.

A linear layer keeps its input for the gradient of its weight. Where that input is a pointwise
function of something that is kept anyway, it is cheaper to compute it again: LayerNorm before the
projections, GELU inside the MLP. Results are those of the plain layers. Inside torch.compile the
plain layers are used: the compiler decides by itself what to compute again.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def compute_dtype(x: Tensor) -> torch.dtype:
    """dtype that autocast gives to a linear layer on ``x``, or that of ``x`` outside of it."""
    kind = x.device.type
    if hasattr(torch, 'get_autocast_dtype'):
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    elif kind == 'cpu':
        enabled, dtype = torch.is_autocast_cpu_enabled(), torch.get_autocast_cpu_dtype()
    else:
        enabled, dtype = torch.is_autocast_enabled(), torch.get_autocast_gpu_dtype()
    return dtype if enabled and x.is_floating_point() and x.dtype != torch.float64 else x.dtype


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
    if torch.compiler.is_compiling():
        return F.linear(
            F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps), weight, bias
        )
    dtype = compute_dtype(x)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _NormLinear.apply(x, norm_weight, norm_bias, eps, weight, bias)


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``linear(gelu(x))``; the activated tokens are not kept.

    Args:
        x: ``(..., C)``.
        weight: ``(D, C)``.
        bias: ``(D,)`` or None.

    Returns:
        ``(..., D)``, in autocast's dtype inside autocast.
    """
    if torch.compiler.is_compiling():
        return F.linear(F.gelu(x), weight, bias)
    dtype = compute_dtype(x)
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _GeluLinear.apply(x, weight, bias)


def norm_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
) -> Tensor:
    """``linear2(gelu(linear1(layer_norm(x))))``; only ``x`` is kept.

    Against :func:`norm_linear` and :func:`gelu_linear` in turn this makes the hidden layer again,
    a ninth of the arithmetic of a block's training step.

    Args:
        x: ``(..., C)``.
        norm_weight: ``(C,)`` scale of the LayerNorm.
        norm_bias: ``(C,)`` offset of the LayerNorm.
        eps: Epsilon of the LayerNorm.
        weight1: ``(H, C)``.
        bias1: ``(H,)``.
        weight2: ``(D, H)``.
        bias2: ``(D,)``.

    Returns:
        ``(..., D)``, in autocast's dtype inside autocast.
    """
    if torch.compiler.is_compiling():
        hidden = norm_linear(x, norm_weight, norm_bias, eps, weight1, bias1)
        return gelu_linear(hidden, weight2, bias2)
    dtype = compute_dtype(x)
    layers = (p.to(dtype) for p in (weight1, bias1, weight2, bias2))
    with torch.autocast(x.device.type, enabled=False):
        return _NormMlp.apply(x, norm_weight, norm_bias, eps, *layers)


class _NormLinear(torch.autograd.Function):
    """LayerNorm in the dtype of its parameters, then the linear layer in the dtype of its own."""

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, eps, weight, bias):
        ctx.eps = eps
        normed, mean, rstd = _normalise(x, norm_weight, norm_bias, eps)
        ctx.save_for_backward(x, norm_weight, norm_bias, mean, rstd, weight)
        return F.linear(normed.to(weight.dtype), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        *norm, weight = ctx.saved_tensors
        normed, *_ = _normalise(*norm[:3], ctx.eps)
        normed = normed.to(weight.dtype)
        grads = _linear_gradients(ctx.needs_input_grad[4:], grad, normed)
        return *_norm_gradients(ctx.needs_input_grad[:3], grad @ weight, *norm), None, *grads


class _NormMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2):
        ctx.eps = eps
        normed, mean, rstd = _normalise(x, norm_weight, norm_bias, eps)
        ctx.save_for_backward(x, norm_weight, norm_bias, mean, rstd, weight1, bias1, weight2)
        return F.linear(F.gelu(F.linear(normed.to(weight1.dtype), weight1, bias1)), weight2, bias2)

    @staticmethod
    def backward(ctx, grad):
        *norm, weight1, bias1, weight2 = ctx.saved_tensors
        normed, *_ = _normalise(*norm[:3], ctx.eps)
        normed = normed.to(weight1.dtype)
        hidden = F.linear(normed, weight1, bias1)
        grads2 = _linear_gradients(ctx.needs_input_grad[6:], grad, F.gelu(hidden))
        grad = torch.ops.aten.gelu_backward(grad @ weight2, hidden)
        grads1 = _linear_gradients(ctx.needs_input_grad[4:6], grad, normed)
        norm_grads = _norm_gradients(ctx.needs_input_grad[:3], grad @ weight1, *norm)
        return *norm_grads, None, *grads1, *grads2


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_weight, grad_bias = _linear_gradients(
            ctx.needs_input_grad[1:], grad, F.gelu(x) if ctx.needs_input_grad[1] else x
        )
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.gelu_backward(grad @ weight, x)
        return grad_x, grad_weight, grad_bias


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


def _norm_gradients(
    needed: tuple[bool, bool, bool],
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of LayerNorm's input, scale and offset; ``grad`` is that of its result."""
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad.to(weight.dtype),
        x.to(weight.dtype),
        weight.shape,
        mean,
        rstd,
        weight,
        bias,
        list(needed),
    )
    return None if grad_x is None else grad_x.to(x.dtype), grad_weight, grad_bias
