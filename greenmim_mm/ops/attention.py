"""Multi-head attention inside groups of slots, each token confined to its own window.

One kernel serves both uses of the backbone: visible tokens packed into groups, and dense windows
(a group then is a window of Swin's cyclic shift). What does not look at values is prepared once
for a stage in an :class:`~greenmim_mm.ops.plans.AttentionPlan`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..compat import compiles_functions, is_compiling, is_exporting
from .cosine import ScaledInPlace, scaled_queries_and_keys
from .plans import AttentionPlan
from .recompute import differentiable_gradients, recompute_obstacle, without_autocast
from .slots import (
    IntoSlots,
    OutOfSlots,
    compiled_into_slots,
    compiled_out_of_slots,
    into_slots,
    out_of_slots,
    split_heads,
)

BACKENDS = ('fused', 'recompute', 'sdpa', 'math', 'reference')

# CUDA's limit of a grid: PyTorch's fused kernel takes no more heads, which here are heads x groups.
_MAX_FUSED_HEADS = 65535


def group_attention(
    qkv: Tensor,
    bias_table: Tensor,
    plan: AttentionPlan,
    backend: str = 'auto',
    groups_at_a_time: int | None = None,
    scale: Tensor | None = None,
    qkv_bias: Tensor | None = None,
) -> Tensor:
    """Attention of each token over the tokens of its window (GreenMIM, group attention).

    Args:
        qkv: ``(B, N, 3 * C)`` projected tokens: query, key and value, each head by head. Where
            ``plan.padding`` is not None there is one row more, ``N + 1``: Swin's padding token,
            which is zero before the projection.
        bias_table: ``((2 * w - 1) ** 2, heads)`` relative position bias.
        plan: Where the ``N`` tokens sit.
        backend: 'fused' (PyTorch's scaled_dot_product_attention, laid out as its kernel for CUDA
            wants it: no attention weight reaches the memory), 'recompute' (batched products, which
            keep their input alone for the backward pass), 'sdpa' (scaled_dot_product_attention as
            a compiler likes it), 'math' (plain products and softmax) or 'reference' (a loop over
            queries, for tests). 'auto' is 'fused' on CUDA and 'recompute' elsewhere; where neither
            can be, it is 'sdpa' inside torch.compile, else 'math': what every transform
            understands.
        groups_at_a_time: Sequential attention (Swin V2): compute so many groups of every image at
            a time, which bounds the memory for attention weights. None: all at once.
        scale: ``(heads,)`` for cosine attention (Swin V2, section 3.3): scores are the cosine of
            query and key times this. None: their product times ``d ** -0.5``.
        qkv_bias: ``(3 * C,)`` bias that ``qkv`` already contains, if its gradient is to be made
            here and not by the projection. That of the keys is zero.

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
        backend = _best_backend(qkv)
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; use 'auto' or one of {BACKENDS}")
    with without_autocast(qkv):
        if backend in _PLAIN:
            if qkv_bias is not None:
                qkv = qkv + (qkv_bias - qkv_bias.detach()).to(qkv.dtype)
            q, k, v = split_heads(qkv, heads)
            if scale is not None:
                q, k = scaled_queries_and_keys(q, k, scale)
            compiled = compiles_functions() and plan.padding is None
            if compiled:
                q, k, v = (compiled_into_slots(x, plan) for x in (q, k, v))
            else:
                q, k, v = (into_slots(x, plan.token) for x in (q, k, v))
            out = _plain(q, k, v, bias_table, plan, groups_at_a_time, _PLAIN[backend])
            out = compiled_out_of_slots(out, plan) if compiled else out_of_slots(out, plan.slot)
            return out.flatten(2)
        # For the fused kernel a slot's heads stay beside each other: one row.
        layout, kernel = (1, _fused) if backend == 'fused' else (heads, _Recomputed.apply)
        plan = plan.by_position if backend == 'fused' else plan
        q, k, v = IntoSlots.apply(qkv, qkv_bias, plan, layout)
        if scale is not None:
            q, _ = ScaledInPlace.apply(q, scale * (width // (3 * heads)) ** 0.5)
            k, _ = ScaledInPlace.apply(k, torch.ones_like(scale))
        out = kernel(q, k, v, bias_table, plan, groups_at_a_time)
        return OutOfSlots.apply(out, plan).flatten(2)


def _best_backend(qkv: Tensor) -> str:
    if recompute_obstacle() is None:
        # That kernel has no double precision, and its gradients no fixed order.
        fused = qkv.is_cuda and qkv.dtype != torch.float64
        fused = fused and not torch.are_deterministic_algorithms_enabled()
        return 'fused' if fused else 'recompute'
    # A compiler knows the operator and decides by itself what to compute again. An exporter may
    # take it apart, in a memory layout of its own: it gets the plain products at once.
    return 'sdpa' if is_compiling() and not is_exporting() else 'math'


def _fused(q, k, v, bias_table, plan, groups_at_a_time) -> Tensor:
    """Attention of ``(B, 1, slots, C)`` rows by PyTorch's kernel.

    It wants ``(B, slots of a group, heads, d)`` in memory. With slots counted position by
    position (:attr:`.AttentionPlan.by_position`), groups stand beside each other as more heads.
    """
    heads, (groups, size) = bias_table.shape[1], plan.window.shape
    parts = [x.view(len(x), size, groups, heads, -1).permute(0, 2, 3, 1, 4) for x in (q, k, v)]
    at_a_time = min(groups_at_a_time or groups, max(1, _MAX_FUSED_HEADS // heads))
    outs = []
    for run, *pairs in plan.parts(at_a_time if at_a_time < groups else None):
        q, k, v = (x[:, run].flatten(1, 2) for x in parts)
        bias = _AlignedBias.apply(bias_table.to(q.dtype), q.shape[1] // heads, *pairs)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        outs.append(out.transpose(1, 2).unflatten(2, (-1, heads)))
    return _joined(outs, dim=2).reshape(len(q), 1, size * groups, -1)


class _AlignedBias(torch.autograd.Function):
    """Additive bias ``(1, G * heads, g, g)``, its rows where kernels like them to begin."""

    @staticmethod
    def forward(ctx, bias_table, groups, bias_index, blocked):
        ctx.shape, ctx.bias_index = bias_table.shape, bias_index
        heads, size = bias_table.shape[1], bias_index.shape[-1]
        bias = bias_table.new_empty(groups, heads, size, -(-size // 8) * 8)[..., :size]
        pairs = bias_table.index_select(0, bias_index.flatten()).view(*bias_index.shape, heads)
        bias.copy_(pairs.permute(0, 3, 1, 2))
        if blocked is not None:
            bias.masked_fill_(blocked[:, None], float('-inf'))
        return bias.flatten(0, 1)[None]

    @staticmethod
    def backward(ctx, grad):
        # What is blocked has no gradient, wherever its index leads.
        heads = ctx.shape[1]
        grad = grad[0].unflatten(0, (-1, heads))
        if len(ctx.bias_index) == 1:
            grad = grad.sum(0, keepdim=True)
        pairs = grad.movedim(1, -1).reshape(-1, heads)
        table = grad.new_zeros(ctx.shape).index_add(0, ctx.bias_index.flatten(), pairs)
        return table, None, None, None


def _plain(q, k, v, bias_table, plan, groups_at_a_time, kernel) -> Tensor:
    """Attention of ``(B, heads, slots, d)`` by one of the kernels below."""
    q, k, v = (x.unflatten(2, plan.window.shape) for x in (q, k, v))
    outs = [
        kernel(*(x[:, :, run] for x in (q, k, v)), bias_table, *pairs)
        for run, *pairs in plan.parts(groups_at_a_time)
    ]
    return _joined(outs, dim=2).flatten(2, 3)


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
    return out.reshape(q.shape)


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


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _additive_bias(bias_table: Tensor, bias_index: Tensor, blocked: Tensor | None) -> Tensor:
    """``(heads, P or G, g, g)``: the position's bias, minus infinity between windows."""
    bias = bias_table.t().index_select(1, bias_index.flatten()).view(-1, *bias_index.shape)
    return bias if blocked is None else bias.masked_fill(blocked, float('-inf'))


class _Recomputed(torch.autograd.Function):
    """Attention of ``(B, heads, slots, d)`` that keeps its input alone for the backward pass.

    Bias and attention weights are made again there: one batched product and one softmax, against
    memory of the size heads x slots x group size.
    """

    @staticmethod
    def forward(ctx, q, k, v, bias_table, plan, groups_at_a_time):
        ctx.save_for_backward(q, k, v, bias_table)
        ctx.plan, ctx.groups_at_a_time = plan, groups_at_a_time
        parts = [x.unflatten(2, plan.window.shape) for x in (q, k, v)]
        outs = []
        for run, *pairs in plan.parts(groups_at_a_time):
            q, k, v = (x[:, :, run] for x in parts)
            out = torch.bmm(_weights(q, k, bias_table, *pairs), _batched(v))
            outs.append(out.view(v.shape))
        return _joined(outs, dim=2).flatten(2, 3)

    @staticmethod
    def backward(ctx, grad):
        (*qkv, bias_table), plan = ctx.saved_tensors, ctx.plan
        if torch.is_grad_enabled():
            grads = differentiable_gradients(
                lambda *x: _plain(*x, plan, ctx.groups_at_a_time, _math),
                (*qkv, bias_table),
                ctx.needs_input_grad[:4],
                grad,
            )
            return *grads, None, None
        parts = [x.unflatten(2, plan.window.shape) for x in (*qkv, grad)]
        grad_table = None
        if ctx.needs_input_grad[3]:
            grad_table = bias_table.new_zeros(bias_table.shape)
        outs = []
        for run, bias_index, blocked in plan.parts(ctx.groups_at_a_time):
            members = [x[:, :, run] for x in parts]
            *grads, grad_score = _slot_gradients(*members, bias_table, bias_index, blocked)
            outs.append(grads)
            if grad_table is not None:
                shared = len(bias_index) == 1
                grad_bias = grad_score.sum((0, 2) if shared else 0, dtype=bias_table.dtype)
                grad_bias = grad_bias.view(bias_table.shape[1], -1).t()
                grad_table.index_add_(0, bias_index.flatten(), grad_bias)
        grads = (_joined(runs, dim=2).flatten(2, 3) for runs in zip(*outs, strict=True))
        return *grads, grad_table, None, None


def _batched(x: Tensor) -> Tensor:
    """``(B, heads, G, g, d)`` to ``(B * heads * G, g, d)``."""
    return x.reshape(-1, *x.shape[3:])


def _weights(
    q: Tensor, k: Tensor, bias_table: Tensor, bias_index: Tensor, blocked: Tensor | None
) -> Tensor:
    """Attention weights ``(B * heads * G, g, g)`` of ``(B, heads, G, g, d)`` queries and keys."""
    *batch, size, width = q.shape
    bias = _additive_bias(bias_table.to(q.dtype), bias_index, blocked)
    score = bias.new_empty(*batch, size, size).copy_(bias).view(-1, size, size)
    # With out= rather than in place: FLOP counters know this one.
    keys = _batched(k).transpose(1, 2)
    torch.baddbmm(score, _batched(q), keys, alpha=width**-0.5, out=score)
    # Half precision is too coarse for the sum of a softmax.
    low = q.dtype in (torch.float16, torch.bfloat16)
    return torch.softmax(score, -1, dtype=torch.float32 if low else None).to(q.dtype)


def _slot_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    bias_table: Tensor,
    bias_index: Tensor,
    blocked: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, and of the scores ``(B, heads, G, g, g)``.

    All arguments but the last three are ``(B, heads, G, g, d)``.
    """
    shape = q.shape
    weight = _weights(q, k, bias_table, bias_index, blocked)
    q, k, v, grad_out = (_batched(x) for x in (q, k, v, grad_out))
    grad_v = torch.bmm(weight.transpose(1, 2), grad_out)
    grad_weight = torch.bmm(grad_out, v.transpose(1, 2))
    grad_score = torch.ops.aten._softmax_backward_data(grad_weight, weight, -1, grad_weight.dtype)
    scale = shape[-1] ** -0.5
    grad_q, grad_k = torch.empty_like(q), torch.empty_like(k)
    torch.baddbmm(grad_q, grad_score, k, beta=0, alpha=scale, out=grad_q)
    torch.baddbmm(grad_k, grad_score.transpose(1, 2), q, beta=0, alpha=scale, out=grad_k)
    grads = (x.view(shape) for x in (grad_q, grad_k, grad_v))
    return *grads, grad_score.view(*shape[:-1], shape[-2])
