"""What Swin V2's attention has in place of V1's: cosine similarity and a computed position bias.

Both are prepared for :func:`~greenmim_mm.ops.group_attention`, which itself is the same for V1
and V2: queries and keys are scaled beforehand, and the bias table comes out of a small network.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .recompute import recompute_obstacle, without_autocast

# Swin V2 keeps the temperature of the softmax above 0.01.
MAX_LOGIT_SCALE = math.log(100.0)


def cosine_qkv(qkv: Tensor, logit_scale: Tensor) -> Tensor:
    """Scale queries and keys so that ordinary attention becomes Swin V2's cosine attention.

    Ordinary attention multiplies query by key by ``d ** -0.5``, with ``d`` channels a head. With
    the query normalised and multiplied by ``exp(logit_scale) * d ** 0.5``, and the key
    normalised, that product is the cosine times ``exp(logit_scale)``. Values stay as they are.

    For the backward pass only the result is kept, which attention keeps anyway, and one number
    for each query and key.

    Args:
        qkv: ``(B, N, 3 * C)`` projected tokens: query, key and value, each head by head.
        logit_scale: ``(heads, 1, 1)`` logarithm of the scale; clamped at ``log(100)``.

    Returns:
        ``(B, N, 3 * C)`` in ``qkv``'s dtype; lengths and scale are computed in float32 or better.

    Raises:
        ValueError: If the width does not fit the heads.
    """
    heads = len(logit_scale)
    if qkv.shape[-1] % (3 * heads):
        raise ValueError(
            f'qkv has width {qkv.shape[-1]}, which is not 3 x {heads} heads x a head width'
        )
    # Not under autocast: a scale of 100 in bfloat16 is off by up to 0.4.
    with without_autocast(qkv):
        wide = torch.promote_types(logit_scale.dtype, torch.float32)
        channels = qkv.shape[-1] // (3 * heads)
        scale = logit_scale.to(wide).clamp(max=MAX_LOGIT_SCALE).exp().flatten() * channels**0.5
        if recompute_obstacle():
            return _plain(qkv, scale)
        return _CosineQKV.apply(qkv, scale)[0]


def _plain(qkv: Tensor, scale: Tensor) -> Tensor:
    q, k, v = qkv.unflatten(-1, (3, len(scale), -1)).unbind(2)
    q = F.normalize(q.to(scale.dtype), dim=-1) * scale[:, None]
    k = F.normalize(k.to(scale.dtype), dim=-1)
    return torch.stack((q.to(qkv.dtype), k.to(qkv.dtype), v), dim=2).flatten(2)


class _CosineQKV(torch.autograd.Function):
    """The scaled tokens, and the factors by which queries and keys were multiplied.

    The factors are a result, too, so that a second derivative finds its way through them.
    """

    @staticmethod
    def forward(ctx, qkv, scale):
        parts = qkv.unflatten(-1, (3, len(scale), -1))
        length = torch.linalg.vector_norm(parts[:, :, :2], dim=-1, dtype=scale.dtype)
        factor = length.clamp_min_(1e-12).reciprocal_()
        factor[:, :, 0] *= scale
        out = torch.empty_like(parts)
        torch.mul(parts[:, :, :2], factor[..., None], out=out[:, :, :2])
        out[:, :, 2] = parts[:, :, 2]
        out = out.view(qkv.shape)
        ctx.save_for_backward(out, factor, scale)
        ctx.set_materialize_grads(False)
        return out, factor

    @staticmethod
    def backward(ctx, grad, grad_factor):
        out, factor, scale = ctx.saved_tensors
        grad = torch.zeros_like(out) if grad is None else grad
        parts, grads = (x.unflatten(-1, (3, len(scale), -1)) for x in (out, grad))
        qk, grad_qk = parts[:, :, :2], grads[:, :, :2]
        # Along the direction of a query or key nothing changes but the length, which is lost.
        along = (qk * grad_qk).sum(-1, dtype=scale.dtype)
        if grad_factor is not None:
            along = along + grad_factor * factor
        grad_scale = along[:, :, 0].sum((0, 1)) / scale if ctx.needs_input_grad[1] else None
        along = along / torch.stack((scale**2, torch.ones_like(scale)))
        grad_qk = grad_qk - qk * along[..., None]
        if torch.is_grad_enabled():
            grad_qk = (grad_qk * factor[..., None]).to(out.dtype)
            return torch.cat((grad_qk, grads[:, :, 2:]), dim=2).flatten(2), grad_scale
        grad_qkv = torch.empty_like(parts)
        torch.mul(grad_qk, factor[..., None], out=grad_qkv[:, :, :2])
        grad_qkv[:, :, 2] = grads[:, :, 2]
        return grad_qkv.view(out.shape), grad_scale


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
