"""Layer pairs that keep one activation for the backward pass where autograd would keep two.

A linear layer keeps its input for the gradient of its weight. Where that input is a pointwise
function of something that is kept anyway, it is cheaper to compute it again: LayerNorm before the
projections, GELU inside the MLP. Results are those of the plain layers.
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
    dtype = compute_dtype(x)
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _GeluLinear.apply(x, weight, bias)


class _NormLinear(torch.autograd.Function):
    """LayerNorm in the dtype of its parameters, then the linear layer in the dtype of its own."""

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, eps, weight, bias):
        shape = norm_weight.shape
        ctx.input_dtype = x.dtype
        normed, mean, rstd = torch.native_layer_norm(
            x.to(norm_weight.dtype), shape, norm_weight, norm_bias, eps
        )
        ctx.save_for_backward(x, norm_weight, norm_bias, mean, rstd, weight)
        return F.linear(normed.to(weight.dtype), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, norm_weight, norm_bias, mean, rstd, weight = ctx.saved_tensors
        x = x.to(norm_weight.dtype)
        normed = (x - mean).mul_(rstd).mul_(norm_weight).add_(norm_bias).to(weight.dtype)
        grad_weight, grad_bias = _linear_gradients(ctx.needs_input_grad[4:], grad, normed)
        grad_x, grad_scale, grad_offset = torch.ops.aten.native_layer_norm_backward(
            (grad @ weight).to(x.dtype),
            x,
            norm_weight.shape,
            mean,
            rstd,
            norm_weight,
            norm_bias,
            list(ctx.needs_input_grad[:3]),
        )
        if grad_x is not None:
            grad_x = grad_x.to(ctx.input_dtype)
        return grad_x, grad_scale, grad_offset, None, grad_weight, grad_bias


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
