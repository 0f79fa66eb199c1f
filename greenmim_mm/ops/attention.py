"""Multi-head attention inside groups of slots, each token confined to its own window.

One kernel serves both uses of the backbone: visible tokens packed into groups, and dense windows
(a group then is a window of Swin's cyclic shift). What does not look at values is prepared once
for a stage in an :class:`~greenmim_mm.ops.plans.AttentionPlan`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..compat import is_compiling, is_exporting
from .plans import AttentionPlan
from .recompute import differentiable_gradients, recompute_obstacle, without_autocast

BACKENDS = ('recompute', 'sdpa', 'math', 'reference')


def group_attention(
    qkv: Tensor,
    bias_table: Tensor,
    plan: AttentionPlan,
    backend: str = 'auto',
    groups_at_a_time: int | None = None,
) -> Tensor:
    """Attention of each token over the tokens of its window (GreenMIM, group attention).

    Args:
        qkv: ``(B, N, 3 * C)`` projected tokens: query, key and value, each head by head. Where
            ``plan.padding`` is not None there is one row more, ``N + 1``: Swin's padding token,
            which is zero before the projection.
        bias_table: ``((2 * w - 1) ** 2, heads)`` relative position bias.
        plan: Where the ``N`` tokens sit.
        backend: 'recompute' (keeps ``qkv`` alone for the backward pass), 'sdpa' (PyTorch's
            scaled_dot_product_attention), 'math' (plain products and softmax) or 'reference' (a
            loop over queries, for tests). 'auto' is 'recompute' where it can be, 'sdpa' inside
            torch.compile, else 'math': what every transform understands.
        groups_at_a_time: Sequential attention (Swin V2): compute so many groups of every image at
            a time, which bounds the memory for attention weights. None: all at once.

    Returns:
        ``(B, N, C)``, heads concatenated, in ``qkv``'s dtype.

    Raises:
        ValueError: If the shapes do not fit or the backend is unknown.
    """
    _, num_rows, width = qkv.shape
    heads = bias_table.shape[1]
    if num_rows != plan.num_rows:
        raise ValueError(f'qkv has {num_rows} rows, the plan is for {plan.num_rows}')
    if width % (3 * heads):
        raise ValueError(f'qkv has width {width}, which is not 3 x {heads} heads x a head width')
    if groups_at_a_time is not None and groups_at_a_time < 1:
        raise ValueError(f'groups_at_a_time={groups_at_a_time} must be positive, or None for all')
    if backend == 'auto':
        backend = _best_backend()
    if backend == 'recompute':
        with without_autocast(qkv):
            return _Recomputed.apply(qkv, bias_table, groups_at_a_time, *plan.tensors)
    if backend not in _PLAIN:
        raise ValueError(f"backend={backend!r} is unknown; use 'auto' or one of {BACKENDS}")
    return _plain_attention(qkv, bias_table, plan, groups_at_a_time, _PLAIN[backend])


def _best_backend() -> str:
    if recompute_obstacle() is None:
        return 'recompute'
    # A compiler knows the operator and decides by itself what to compute again. An exporter may
    # take it apart, in a memory layout of its own: it gets the plain products at once.
    return 'sdpa' if is_compiling() and not is_exporting() else 'math'


def _plain_attention(qkv, bias_table, plan, groups_at_a_time, kernel) -> Tensor:
    """Attention by one of the kernels below, as autograd sees it."""
    slots = _to_slots(qkv, bias_table.shape[1], plan)
    outs = []
    for run, *pairs in plan.parts(groups_at_a_time):
        outs.append(kernel(*slots[:, :, :, run], bias_table, *pairs))
    return _from_slots(_joined(outs, dim=2), plan.slot)


def _math(q, k, v, bias_table, bias_index, blocked) -> Tensor:
    """``(B, heads, G, g, d)`` queries, keys and values to outputs of that shape."""
    score = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    weight = (score + _additive_bias(bias_table, bias_index, blocked)).softmax(-1)
    return weight.to(v.dtype) @ v


def _sdpa(q, k, v, bias_table, bias_index, blocked) -> Tensor:
    """As :func:`_math`; kernels take four dimensions, here heads and groups are one."""
    bias = _additive_bias(bias_table.to(q.dtype), bias_index, blocked)
    bias = bias.expand(-1, q.shape[2], -1, -1).flatten(0, 1)[None]
    out = F.scaled_dot_product_attention(*(x.flatten(1, 2) for x in (q, k, v)), attn_mask=bias)
    return out.view(q.shape)


def _reference(q, k, v, bias_table, bias_index, blocked) -> Tensor:
    """The definition: one softmax for each query over the keys of its window."""
    out = torch.zeros_like(v)
    for group in range(q.shape[2]):
        index = bias_index[group % len(bias_index)]
        for query in range(q.shape[3]):
            keys = slice(None) if blocked is None else ~blocked[group, query]
            score = torch.einsum('bhd,bhkd->bhk', q[:, :, group, query], k[:, :, group, keys])
            score = score * q.shape[-1] ** -0.5 + bias_table[index[query, keys]].t()
            weight = score.softmax(dim=-1)
            out[:, :, group, query] = torch.einsum('bhk,bhkd->bhd', weight, v[:, :, group, keys])
    return out


_PLAIN = {'sdpa': _sdpa, 'math': _math, 'reference': _reference}


def _to_slots(qkv: Tensor, heads: int, plan: AttentionPlan) -> Tensor:
    """``(B, N or N + 1, 3 * C)`` tokens to ``(3, B, heads, G, g, d)`` slots.

    This is what batched products want, and one pass over the tokens makes it.
    """
    tokens = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return tokens.index_select(3, plan.token).unflatten(3, plan.window.shape)


def _from_slots(slots: Tensor, slot: Tensor) -> Tensor:
    """``(B, ..., heads, G, g, d)`` slots to ``(B, N, ... * heads * d)`` tokens, in one pass."""
    slots = slots.flatten(-3, -2).movedim(-2, 1)
    return slots.index_select(1, slot).flatten(2)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _additive_bias(bias_table: Tensor, bias_index: Tensor, blocked: Tensor | None) -> Tensor:
    """``(heads, P or G, g, g)``: the position's bias, minus infinity between windows."""
    bias = bias_table.t().index_select(1, bias_index.flatten()).view(-1, *bias_index.shape)
    return bias if blocked is None else bias.masked_fill(blocked, float('-inf'))


class _Recomputed(torch.autograd.Function):
    """Group attention that keeps nothing for the backward pass but its input.

    Groups, bias and attention weights are made again there: one batched product and one softmax,
    against memory of the size heads x slots x group size.
    """

    @staticmethod
    def forward(ctx, qkv, bias_table, groups_at_a_time, *tensors):
        ctx.save_for_backward(qkv, bias_table, *tensors)
        ctx.groups_at_a_time = groups_at_a_time
        plan, heads = AttentionPlan(*tensors), bias_table.shape[1]
        slots = _to_slots(qkv, heads, plan)
        outs = []
        for run, *pairs in plan.parts(groups_at_a_time):
            _, _, v, weight = _weights(slots[:, :, :, run], bias_table, *pairs)
            outs.append(torch.bmm(weight, v).view(len(qkv), heads, -1, *v.shape[1:]))
        return _from_slots(_joined(outs, dim=2), plan.slot)

    @staticmethod
    def backward(ctx, grad):
        qkv, bias_table, *tensors = ctx.saved_tensors
        plan, (batch, _, width), heads = AttentionPlan(*tensors), qkv.shape, bias_table.shape[1]
        if torch.is_grad_enabled():
            grads = differentiable_gradients(
                lambda *x: _plain_attention(*x, plan, ctx.groups_at_a_time, _math),
                (qkv, bias_table),
                ctx.needs_input_grad[:2],
                grad,
            )
            return *grads, None, *[None] * len(tensors)
        groups, size = plan.window.shape
        slots = _to_slots(qkv, heads, plan)
        # Slots without a token have no output, hence no gradient.
        grad_out = grad.new_zeros(batch, heads, groups * size, width // (3 * heads))
        grad_out.index_copy_(2, plan.slot, grad.unflatten(2, (heads, -1)).transpose(1, 2))
        grad_out = grad_out.unflatten(2, (groups, size))
        grad_table = None
        if ctx.needs_input_grad[1]:
            grad_table = bias_table.new_zeros(bias_table.shape)

        parts = []
        for run, bias_index, blocked in plan.parts(ctx.groups_at_a_time):
            grads, grad_score = _slot_gradients(
                slots[:, :, :, run], grad_out[:, :, run], bias_table, bias_index, blocked
            )
            parts.append(grads)
            if grad_table is not None:
                shared = len(bias_index) == 1
                grad_bias = grad_score.sum((0, 2) if shared else 0, dtype=bias_table.dtype)
                grad_table.index_add_(0, bias_index.flatten(), grad_bias.view(heads, -1).t())
        grads = _joined(parts, dim=3).transpose(0, 1)
        # An unused slot meets unused slots alone, and nobody reads its output: no gradient.
        grad_qkv = _from_slots(grads, plan.slot)
        if plan.padding is not None:
            row = _from_slots(grads, plan.padding).sum(1, keepdim=True)
            grad_qkv = torch.cat([grad_qkv, row], dim=1)
        return grad_qkv, grad_table, None, *[None] * len(tensors)


def _weights(
    slots: Tensor, bias_table: Tensor, bias_index: Tensor, blocked: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values ``(B * heads * G, g, d)`` and attention ``(..., g, g)``.

    ``slots`` is ``(3, B, heads, G, g, d)``.
    """
    _, *batch, size, width = slots.shape
    q, k, v = slots.reshape(3, -1, size, width)
    bias = _additive_bias(bias_table.to(slots.dtype), bias_index, blocked)
    score = bias.new_empty(*batch, size, size).copy_(bias).view(-1, size, size)
    # With out= rather than in place: FLOP counters know this one.
    torch.baddbmm(score, q, k.transpose(1, 2), alpha=width**-0.5, out=score)
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
    """Gradients of the slots, in their shape, and of the scores ``(B, heads, G, g, g)``.

    ``slots`` is ``(3, B, heads, G, g, d)``, ``grad_out`` is ``(B, heads, G, g, d)``.
    """
    *_, size, width = slots.shape
    q, k, v, weight = _weights(slots, bias_table, bias_index, blocked)
    grad_out = grad_out.reshape(v.shape)
    grads = slots.new_empty(3, *v.shape)
    torch.bmm(weight.transpose(1, 2), grad_out, out=grads[2])
    grad_weight = torch.bmm(grad_out, v.transpose(1, 2))
    grad_score = torch.ops.aten._softmax_backward_data(grad_weight, weight, -1, grad_weight.dtype)
    scale = width**-0.5
    torch.baddbmm(grads[0], grad_score, k, beta=0, alpha=scale, out=grads[0])
    torch.baddbmm(grads[1], grad_score.transpose(1, 2), q, beta=0, alpha=scale, out=grads[1])
    return grads.view(slots.shape), grad_score.view(*slots.shape[1:-1], size)
