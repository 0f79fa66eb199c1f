"""Multi-head attention inside groups of slots, each token confined to its own window.

One kernel serves both uses of the backbone: visible tokens packed into groups, and dense windows
(a group then is a window of Swin's cyclic shift). Everything that does not look at values is
prepared once for a stage in an :class:`AttentionPlan` and shared by its blocks.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .layout import GroupPlan, to_device

BACKENDS = ('recompute', 'sdpa', 'reference')


@dataclass(frozen=True)
class AttentionPlan:
    """A :class:`GroupPlan` on a device, with what attention derives from it.

    ``P`` is ``G``, or 1 where all groups have the same relative positions.

    Attributes:
        token: ``(G * g,)`` int64, token of each slot; a slot without one holds any valid index.
        slot: ``(N,)`` int64, slot of each token.
        padding: ``(S,)`` int64, slots that hold a padding token of Swin, or None.
        window: ``(G, g)`` int64, window of each slot, -1 where a slot is unused.
        bias_index: ``(P, g, g)`` int64, row of the relative position bias table for each pair
            (query, key) of a window; 0 for other pairs.
        blocked: ``(G, g, g)`` bool, True where query and key are not of one window; None if all
            pairs of every group are.
    """

    token: Tensor
    slot: Tensor
    padding: Tensor | None
    window: Tensor
    bias_index: Tensor
    blocked: Tensor | None

    @property
    def num_tokens(self) -> int:
        """Number ``N`` of tokens that the plan is for."""
        return self.slot.numel()

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The fields, in order: what autograd and torch.compile take where they take no object."""
        return self.token, self.slot, self.padding, self.window, self.bias_index, self.blocked

    def parts(self, groups_at_a_time: int | None) -> list[tuple[slice, Tensor, Tensor | None]]:
        """Runs of groups: which groups, their ``bias_index`` and their ``blocked``."""
        if groups_at_a_time is None:
            return [(slice(None), self.bias_index, self.blocked)]
        starts = range(0, len(self.window), groups_at_a_time)
        runs = [slice(start, start + groups_at_a_time) for start in starts]
        shared = len(self.bias_index) == 1
        return [
            (
                run,
                self.bias_index if shared else self.bias_index[run],
                None if self.blocked is None else self.blocked[run],
            )
            for run in runs
        ]

    @classmethod
    def build(cls, groups: GroupPlan, window_size: int, device: torch.device) -> 'AttentionPlan':
        """Move a plan to ``device``.

        Args:
            groups: The plan.
            window_size: Side of the window that the bias table was made for. Windows may be
                smaller, not larger.
            device: Where attention will run. The copies to CUDA do not wait for the device.
        """
        num_tokens = groups.num_tokens
        flat_token = groups.token.reshape(-1)
        is_padding = flat_token == num_tokens
        # An index into the table is a difference of two numbers, one for each slot.
        position = groups.coords[..., 0] * (2 * window_size - 1) + groups.coords[..., 1]
        window = to_device(groups.window, device)
        position = to_device(position, device)
        relative = position[:, :, None] - position[:, None, :] + 2 * window_size * (window_size - 1)
        blocked = None
        if (groups.window != groups.window[:, :1]).any():
            blocked = window[:, :, None] != window[:, None, :]
            if len(relative) == len(blocked):
                relative = relative.masked_fill(blocked, 0)
        return cls(
            token=to_device(np.where(is_padding, 0, flat_token), device),
            slot=to_device(groups.slot, device),
            padding=to_device(np.flatnonzero(is_padding), device) if is_padding.any() else None,
            window=window,
            bias_index=relative,
            blocked=blocked,
        )


def relative_position_index(window_size: int) -> Tensor:
    """``(w * w, w * w)`` int64 rows of the bias table for each pair of a window's tokens.

    The same numbers as the buffer of that name in mmdet's, mmpretrain's and timm's Swin.
    """
    row, column = np.divmod(np.arange(window_size**2), window_size)
    position = torch.from_numpy(row * (2 * window_size - 1) + column)
    return position[:, None] - position[None, :] + 2 * window_size * (window_size - 1)


def group_attention(
    qkv: Tensor,
    bias_table: Tensor,
    plan: AttentionPlan,
    padding_qkv: Tensor | None = None,
    backend: str = 'recompute',
    groups_at_a_time: int | None = None,
) -> Tensor:
    """Attention of each token over the tokens of its window (GreenMIM, group attention).

    Args:
        qkv: ``(B, N, 3 * C)`` projected tokens: query, key and value, each head by head.
        bias_table: ``((2 * w - 1) ** 2, heads)`` relative position bias.
        plan: Where the ``N`` tokens sit.
        padding_qkv: ``(3 * C,)`` projection of a padding token, which is zero before the
            projection: its bias. None stands for zeros (a projection without bias).
        backend: 'recompute' (groups; keeps ``qkv`` alone for the backward pass), 'sdpa' (groups
            through PyTorch's scaled_dot_product_attention) or 'reference' (a loop over queries,
            for tests).
        groups_at_a_time: Sequential attention (Swin V2): compute so many groups of every image at
            a time, which bounds the memory for attention weights. None: all at once.

    Returns:
        ``(B, N, C)``, heads concatenated, in ``qkv``'s dtype.

    Raises:
        ValueError: If the shapes do not fit or the backend is unknown.
    """
    batch, num_tokens, width = qkv.shape
    heads = bias_table.shape[1]
    if num_tokens != plan.num_tokens:
        raise ValueError(f'qkv has {num_tokens} tokens, the plan is for {plan.num_tokens}')
    if width % (3 * heads):
        raise ValueError(f'qkv has width {width}, which is not 3 x {heads} heads x a head width')
    if backend not in BACKENDS:
        raise ValueError(f'backend={backend!r} is unknown; use one of {BACKENDS}')
    if plan.padding is not None and padding_qkv is None:
        padding_qkv = qkv.new_zeros(width)
    if groups_at_a_time is not None and groups_at_a_time < 1:
        raise ValueError(f'groups_at_a_time={groups_at_a_time} must be positive, or None for all')
    # torch.compile decides by itself what to compute again.
    if backend == 'recompute' and not torch.compiler.is_compiling():
        with torch.autocast(qkv.device.type, enabled=False):
            return _Recomputed.apply(qkv, padding_qkv, bias_table, groups_at_a_time, *plan.tensors)
    groups, size = plan.window.shape
    # (B, G, g, 3, heads, d) -> three of (B, G, heads, g, d)
    slots = _to_slots(qkv, padding_qkv, plan).view(batch, groups, size, 3, heads, -1)
    q, k, v = slots.permute(3, 0, 1, 4, 2, 5)
    if backend == 'reference':
        out = _reference(q, k, v, bias_table, plan)
    else:
        # One additive bias stands for positions and windows.
        table = bias_table.to(q.dtype)
        out = [
            F.scaled_dot_product_attention(
                q[:, run], k[:, run], v[:, run], attn_mask=_additive_bias(table, *pairs)
            )
            for run, *pairs in plan.parts(groups_at_a_time)
        ]
        out = out[0] if len(out) == 1 else torch.cat(out, dim=1)
    return out.transpose(2, 3).reshape(batch, groups * size, -1).index_select(1, plan.slot)


def _to_slots(qkv: Tensor, padding_row: Tensor | None, plan: AttentionPlan) -> Tensor:
    """``(B, N, 3 * C)`` tokens to ``(B, G * g, 3 * C)`` slots."""
    slots = qkv.index_select(1, plan.token)
    if plan.padding is not None:
        rows = padding_row.to(qkv.dtype).expand(len(qkv), plan.padding.numel(), -1)
        slots = slots.index_copy(1, plan.padding, rows)
    return slots


def _additive_bias(bias_table: Tensor, bias_index: Tensor, blocked: Tensor | None) -> Tensor:
    """``(P or G, heads, g, g)``: the position's bias, minus infinity between windows."""
    bias = bias_table.t().index_select(1, bias_index.flatten())
    bias = bias.view(-1, *bias_index.shape).transpose(0, 1)
    if blocked is not None:
        bias = bias.masked_fill(blocked[:, None], float('-inf'))
    return bias


def _reference(q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor, plan: AttentionPlan) -> Tensor:
    """The definition: one softmax for each query over the keys of its window."""
    out = torch.zeros_like(v)
    for group, window in enumerate(plan.window.tolist()):
        index = plan.bias_index[group % len(plan.bias_index)]
        for query, own in enumerate(window):
            if own < 0:
                continue
            keys = [key for key, other in enumerate(window) if other == own]
            score = torch.einsum('bhd,bhkd->bhk', q[:, group, :, query], k[:, group, :, keys])
            score = score * q.shape[-1] ** -0.5 + bias_table[index[query, keys]].t()
            weight = score.softmax(dim=-1)
            out[:, group, :, query] = torch.einsum('bhk,bhkd->bhd', weight, v[:, group, :, keys])
    return out


class _Recomputed(torch.autograd.Function):
    """Group attention that keeps nothing for the backward pass but its input.

    Groups, bias and attention weights are made again there: one batched product and one softmax,
    against memory of the size heads x slots x group size.
    """

    @staticmethod
    def forward(ctx, qkv, padding_row, bias_table, groups_at_a_time, *tensors):
        ctx.save_for_backward(qkv, padding_row, bias_table, *tensors)
        ctx.groups_at_a_time = groups_at_a_time
        plan, batch, heads = AttentionPlan(*tensors), len(qkv), bias_table.shape[1]
        groups, size = plan.window.shape
        slots = _to_slots(qkv, padding_row, plan).view(batch, groups, size, 3, heads, -1)
        outs = []
        for run, *pairs in plan.parts(groups_at_a_time):
            _, _, v, weight = _weights(slots[:, run], bias_table, *pairs)
            out = torch.bmm(weight, v).view(batch, -1, heads, size, v.shape[2])
            outs.append(out.transpose(2, 3).reshape(batch, -1, qkv.shape[2] // 3))
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
        return out.index_select(1, plan.slot)

    @staticmethod
    def backward(ctx, grad):
        qkv, padding_row, bias_table, *tensors = ctx.saved_tensors
        plan, batch, heads = AttentionPlan(*tensors), len(qkv), bias_table.shape[1]
        groups, size = plan.window.shape
        slots = _to_slots(qkv, padding_row, plan).view(batch, groups, size, 3, heads, -1)
        # Slots without a token have no output, hence no gradient.
        grad_out = grad.new_zeros(batch, groups * size, grad.shape[2])
        grad_out.index_copy_(1, plan.slot, grad)
        grad_out = grad_out.view(batch, groups, size, heads, -1).transpose(2, 3)
        grad_table = None
        if ctx.needs_input_grad[2]:
            grad_table = bias_table.new_zeros(bias_table.shape[::-1])

        parts = []
        for run, bias_index, blocked in plan.parts(ctx.groups_at_a_time):
            grads, grad_score = _slot_gradients(
                slots[:, run], grad_out[:, run], bias_table, bias_index, blocked
            )
            parts.append(grads)
            if grad_table is not None:
                shared = len(bias_index) == 1
                grad_bias = grad_score.sum((0, 1) if shared else 0, dtype=bias_table.dtype)
                grad_bias = grad_bias.view(-1, heads, size * size).transpose(0, 1)
                grad_table.index_add_(1, bias_index.flatten(), grad_bias.reshape(heads, -1))
        grads = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        # An unused slot meets unused slots alone, and nobody reads its output: no gradient.
        grad_qkv = grads.index_select(1, plan.slot)
        grad_row = None
        if padding_row is not None and ctx.needs_input_grad[1]:
            grad_row = torch.zeros_like(padding_row)
            if plan.padding is not None:
                grad_row += grads.index_select(1, plan.padding).sum((0, 1))
        grad_table = None if grad_table is None else grad_table.t()
        return grad_qkv, grad_row, grad_table, None, *[None] * len(tensors)


def _weights(
    slots: Tensor, bias_table: Tensor, bias_index: Tensor, blocked: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values ``(B * G * heads, g, d)`` and attention ``(..., g, g)``.

    ``slots`` is ``(B, G, g, 3, heads, d)``.
    """
    batch, groups, size, _, heads, width = slots.shape
    slots = slots.permute(3, 0, 1, 4, 2, 5)
    q, k, v = slots.reshape(3, batch * groups * heads, size, -1)
    bias = _additive_bias(bias_table.to(slots.dtype), bias_index, blocked)
    score = bias.new_empty(batch, groups, heads, size, size).copy_(bias).view(-1, size, size)
    score.baddbmm_(q, k.transpose(1, 2), alpha=width**-0.5)
    # Half precision is too coarse for the sum of a softmax.
    low = slots.dtype in (torch.float16, torch.bfloat16)
    weight = torch.softmax(score, -1, dtype=torch.float32 if low else None).to(slots.dtype)
    return q, k, v, weight


def _slot_gradients(
    slots: Tensor,
    grad_out: Tensor,
    bias_table: Tensor,
    bias_index: Tensor,
    blocked: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the slots ``(B, G * g, 3 * C)`` and of the scores ``(B, G, heads, g, g)``.

    ``slots`` is ``(B, G, g, 3, heads, d)``, ``grad_out`` is ``(B, G, heads, g, d)``.
    """
    batch, groups, size, _, heads, width = slots.shape
    q, k, v, weight = _weights(slots, bias_table, bias_index, blocked)
    grad_out = grad_out.reshape(v.shape)
    grads = slots.new_empty(3, *v.shape)
    torch.bmm(weight.transpose(1, 2), grad_out, out=grads[2])
    grad_weight = torch.bmm(grad_out, v.transpose(1, 2))
    grad_score = torch.ops.aten._softmax_backward_data(grad_weight, weight, -1, grad_weight.dtype)
    scale = width**-0.5
    torch.baddbmm(grads[0], grad_score, k, beta=0, alpha=scale, out=grads[0])
    torch.baddbmm(grads[1], grad_score.transpose(1, 2), q, beta=0, alpha=scale, out=grads[1])
    grads = grads.view(3, batch, groups, heads, size, -1).permute(1, 2, 4, 0, 3, 5)
    grads = grads.reshape(batch, groups * size, -1)
    return grads, grad_score.view(batch, groups, heads, size, size)
