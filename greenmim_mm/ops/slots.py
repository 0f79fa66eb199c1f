"""Projected tokens into the slots of a plan and back: one gather each, in the backward pass, too.

A token sits in one slot, so the gradient of a gather is a gather, where autograd would fill zeros
and add. :class:`IntoSlots` and :class:`OutOfSlots` are for eager mode. Transforms and exporters get
:func:`into_slots` and :func:`out_of_slots`, which they understand, and compilers :class:`Gather`.
"""

import torch
from torch import Tensor

from .plans import AttentionPlan


def into_slots(tokens: Tensor, token: Tensor) -> Tensor:
    """``(B, N or N + 1, heads, d)`` tokens to ``(B, heads, slots, d)``."""
    return tokens.permute(0, 2, 1, 3).index_select(2, token)


def out_of_slots(slots: Tensor, slot: Tensor) -> Tensor:
    """``(B, heads, slots, d)`` to ``(B, N, heads, d)`` tokens."""
    return slots.permute(0, 2, 1, 3).index_select(1, slot)


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """``(B, R, 3 * C)`` to query, key and value, ``(B, R, heads, C / heads)`` each; views."""
    return qkv.unflatten(2, (3, heads, -1)).unbind(2)


class Gather(torch.autograd.Function):
    """``x.index_select(dim, index)`` for a compiler, which so writes no zeros to add gradients to.

    ``back`` finds, for each row of ``x``, the one place that it went to. Rows that are not ``kept``
    (bool, along ``dim``, the last but one) went nowhere; None: all went somewhere.
    """

    @staticmethod
    def forward(ctx, x, dim, index, back, kept):
        ctx.dim, ctx.has_rest = dim, kept is not None
        ctx.save_for_backward(back, back if kept is None else kept)
        return x.index_select(dim, index)

    @staticmethod
    def backward(ctx, grad):
        back, kept = ctx.saved_tensors
        rows = grad.index_select(ctx.dim, back)
        if ctx.has_rest:
            rows = torch.where(kept[:, None], rows, 0)
        return rows, None, None, None, None


def compiled_into_slots(tokens: Tensor, plan: AttentionPlan) -> Tensor:
    """:func:`into_slots` by :class:`Gather`; for plans without a padding token."""
    return Gather.apply(tokens.permute(0, 2, 1, 3), 2, plan.token, plan.slot, None)


def compiled_out_of_slots(slots: Tensor, plan: AttentionPlan) -> Tensor:
    """:func:`out_of_slots` by :class:`Gather`; for plans without a padding token."""
    # Not by plan.idle: whether a mask leaves idle slots, and how many, is no reason to compile.
    kept = plan.window.flatten() >= 0
    return Gather.apply(slots, 2, plan.slot, plan.token, kept).permute(0, 2, 1, 3)


class IntoSlots(torch.autograd.Function):
    """``(B, R, 3 * C)`` projected tokens to query, key and value, ``(B, heads, slots, d)`` each.

    The gradient of the projection's bias is made here, too: that of the queries and of the values
    is the sum of what is at hand, that of the keys is zero, for a softmax does not see what its
    scores have in common. A slot without a token holds a copy of any row. It meets only its like,
    and nobody reads its output: no gradient comes from there.
    """

    @staticmethod
    def forward(ctx, qkv, bias, plan, heads):
        ctx.plan, ctx.shape = plan, qkv.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return tuple(into_slots(part, plan.token) for part in split_heads(qkv, heads))

    @staticmethod
    def backward(ctx, *grads):
        plan, heads = ctx.plan, grads[0].shape[1]
        wants_bias = ctx.bias_dtype is not None and ctx.needs_input_grad[1]
        if torch.is_grad_enabled():
            return *_differentiable(grads, ctx, wants_bias), None, None
        grad_bias = None
        if wants_bias:
            grad_bias = grads[0].new_zeros(ctx.shape[2], dtype=ctx.bias_dtype)
            for part in (0, 2):
                total = grad_bias.view(3, heads, -1)[part]
                torch.sum(grads[part], (0, 2), dtype=ctx.bias_dtype, out=total)
        rows = grads[0].new_empty(ctx.shape)
        for grad, part in zip(grads, split_heads(rows[:, : len(plan.slot)], heads), strict=True):
            torch.index_select(grad.permute(0, 2, 1, 3), 1, plan.slot, out=part)
        if plan.padding is not None:
            rows[:, -1] = _of_padding(grads, plan.padding)
        return rows, grad_bias, None, None


def _differentiable(grads, ctx, wants_bias: bool) -> tuple[Tensor, Tensor | None]:
    """What the backward pass returns, by operators that autograd knows."""
    plan: AttentionPlan = ctx.plan
    rows = torch.stack([out_of_slots(grad, plan.slot) for grad in grads], dim=2).flatten(2)
    if plan.padding is not None:
        rows = torch.cat([rows, _of_padding(grads, plan.padding)[:, None]], dim=1)
    grad_bias = None
    if wants_bias:
        query, value = (g.sum((0, 2), dtype=ctx.bias_dtype).flatten() for g in grads[::2])
        grad_bias = torch.cat([query, torch.zeros_like(query), value])
    return rows, grad_bias


def _of_padding(grads: tuple[Tensor, ...], padding: Tensor) -> Tensor:
    """``(B, 3 * C)`` gradient of the padding token, which sits in many slots."""
    return torch.stack([out_of_slots(grad, padding).sum(1) for grad in grads], dim=1).flatten(1)


class OutOfSlots(torch.autograd.Function):
    """``(B, heads, slots, d)`` to ``(B, N, heads, d)`` tokens."""

    @staticmethod
    def forward(ctx, slots, plan):
        ctx.plan = plan
        return out_of_slots(slots, plan.slot)

    @staticmethod
    def backward(ctx, grad):
        plan: AttentionPlan = ctx.plan
        # The padding token is none of the N; what its slots hold is cleared as any other's.
        token = plan.token if plan.padding is None else plan.token.clamp(max=len(plan.slot) - 1)
        slots = into_slots(grad, token)
        return slots if plan.idle is None else slots.index_fill_(2, plan.idle, 0), None
