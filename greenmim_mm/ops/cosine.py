"""What Swin V2's attention has in place of V1's: cosine similarity and a computed position bias.

:func:`~greenmim_mm.ops.group_attention` is the same for V1 and V2: queries and keys are scaled
beforehand, and the bias table comes out of a small network.
"""

import math

import torch
from torch import Tensor

from ..compat import mixes_dtypes

# Swin V2 keeps the temperature of the softmax above 0.01.
MAX_LOGIT_SCALE = math.log(100.0)


def cosine_scale(logit_scale: Tensor) -> Tensor:
    """What cosines are multiplied by, ``(heads,)``, in float32 or better.

    Args:
        logit_scale: ``(heads, 1, 1)`` logarithm of the scale; clamped at ``log(100)``.
    """
    wide = torch.promote_types(logit_scale.dtype, torch.float32)
    return logit_scale.to(wide).clamp(max=MAX_LOGIT_SCALE).exp().flatten()


def scaled_queries_and_keys(q: Tensor, k: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Scale queries and keys so that ordinary attention becomes Swin V2's cosine attention.

    Ordinary attention multiplies query by key by ``d ** -0.5``, with ``d`` channels a head. With
    the query normalised and multiplied by ``scale * d ** 0.5``, and the key normalised, that
    product is the cosine times ``scale``. Lengths are computed in the dtype of ``scale``.

    Args:
        q: ``(..., heads, d)``.
        k: ``(..., heads, d)``.
        scale: ``(heads,)``.
    """
    wide = scale[:, None] * q.shape[-1] ** 0.5
    query, key = (_normalised(x.to(scale.dtype)) for x in (q, k))
    return (query * wide).to(q.dtype), key.to(k.dtype)


def _normalised(x: Tensor) -> Tensor:
    """``F.normalize``, of which the second derivative at zero (a padding token) is a number."""
    return x * x.square().sum(-1, keepdim=True).clamp(min=1e-24).rsqrt()


class ScaledInPlace(torch.autograd.Function):
    """Queries (or keys) in place: normalised, and multiplied by a number for each head.

    For the backward pass only the result is kept, which attention keeps anyway, and one factor for
    each of them. The factors are a result, too, so that a second derivative finds its way through
    them. ``x`` is ``(B, heads, slots, d)`` or, all heads in a row, ``(B, 1, slots, heads * d)``;
    ``scale`` is ``(heads,)``.
    """

    @staticmethod
    def forward(ctx, x, scale):
        parts = x.unflatten(3, (len(scale) // x.shape[1], -1))
        factor = torch.linalg.vector_norm(parts, dim=-1, dtype=scale.dtype)
        factor = factor.clamp_min_(1e-12).reciprocal_().mul_(scale.view(x.shape[1], 1, -1))
        parts.mul_(factor[..., None])
        ctx.mark_dirty(x)
        ctx.save_for_backward(x, factor, scale)
        ctx.set_materialize_grads(False)
        return x, factor

    @staticmethod
    def backward(ctx, grad, grad_factor):
        x, factor, scale = ctx.saved_tensors
        scale = scale.view(x.shape[1], 1, -1)
        grad = torch.zeros_like(x) if grad is None else grad
        parts, grads = (t.unflatten(3, (scale.shape[2], -1)) for t in (x, grad))
        # Along the direction of a query or key nothing changes but the length, which is lost.
        along = (parts * grads).sum(-1, dtype=scale.dtype)
        if grad_factor is not None:
            along = along + grad_factor * factor
        grad_scale = None
        if ctx.needs_input_grad[1]:
            grad_scale = (along.sum((0, 2), keepdim=True)[0] / scale).flatten()
        along = (along / scale.square())[..., None]
        if torch.is_grad_enabled() or not (x.dtype == along.dtype or mixes_dtypes(x)):
            # Differentiable, and for any dtypes.
            return ((grads - parts * along) * factor[..., None]).to(x.dtype).flatten(3), grad_scale
        grad_parts = torch.empty_like(parts)
        torch.addcmul(grads, parts, along, value=-1, out=grad_parts)
        return grad_parts.mul_(factor[..., None]).flatten(3), grad_scale


def log_spaced_offsets(window_size: int, pretrained_window_size: int = 0) -> Tensor:
    """Input of Swin V2's position network: offsets inside a window, logarithmically spaced.

    Offsets are divided by the largest one of the window that the network was trained with, times
    8; then ``sign(x) * log2(1 + |x|) / 3``. A larger window so extrapolates by little.

    Args:
        window_size: Side of the window.
        pretrained_window_size: Side of the window in pre-training; 0 stands for ``window_size``.

    Returns:
        ``(1, 2 * w - 1, 2 * w - 1, 2)`` float32: row and column offset.
    """
    largest = max((pretrained_window_size or window_size) - 1, 1)
    offset = torch.arange(1 - window_size, window_size, dtype=torch.float64) / largest * 8
    offset = offset.sign() * torch.log2(offset.abs() + 1) / math.log2(8)
    return torch.stack(torch.meshgrid(offset, offset, indexing='ij'), dim=-1)[None].float()


def coords_windows(coords: Tensor) -> tuple[int, int]:
    """Window and pre-training window of offsets: the inverse of :func:`log_spaced_offsets`.

    Args:
        coords: ``(1, 2 * w - 1, 2 * w - 1, 2)``, a ``relative_coords_table`` of any Swin V2.

    Raises:
        ValueError: If it is none.
        OverflowError: If its offsets are too large for any window.
    """
    side = coords.shape[1] if coords.ndim == 4 else 0
    if side % 2 == 0 or coords.shape != (1, side, side, 2):
        raise ValueError(
            'a relative_coords_table has shape (1, 2 * window_size - 1, 2 * window_size - 1, 2), '
            f'not {tuple(coords.shape)}'
        )
    window_size = (side + 1) // 2
    farthest = (torch.exp2(coords.double().max() * 3).item() - 1) / 8
    if not math.isfinite(farthest):
        raise OverflowError('offsets of this relative_coords_table are endless')
    pretrained = round((window_size - 1) / farthest) + 1 if farthest > 0 else window_size
    return window_size, pretrained
