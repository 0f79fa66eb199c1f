"""Group attention against softmax over one window at a time, values and gradients."""

import numpy as np
import pytest
import torch

from greenmim_mm.ops import (
    BACKENDS,
    UnitMask,
    attention_plan,
    dense_plan,
    group_attention,
    grouped_plan,
    random_mask,
    relative_position_index,
    visible_tokens,
    window_grid,
)

CPU = torch.device('cpu')


def slow_attention(qkv, table, cut, coords, window_size, padding_qkv):
    """Loop over queries; keys are all tokens of the window and its padding."""
    batch, num_tokens, width = qkv.shape
    heads = table.shape[1]
    cells = np.stack(np.mgrid[: cut.padded[0], : cut.padded[1]], axis=-1).reshape(-1, 2)
    padding = cells[(cells >= cut.grid).any(axis=1)]
    everything = torch.cat([qkv, padding_qkv.expand(batch, len(padding), -1)], dim=1)
    q, k, v = everything.view(batch, -1, 3, heads, width // 3 // heads).unbind(2)
    where = np.concatenate([coords, padding])
    window = cut.window_ids(where)
    out = []
    for query in range(num_tokens):
        keys = np.flatnonzero(window == window[query])
        delta = where[query] - where[keys] + window_size - 1
        bias = table[torch.from_numpy(delta[:, 0] * (2 * window_size - 1) + delta[:, 1])]
        score = torch.einsum('bhd,bkhd->bkh', q[:, query], k[:, keys])
        weight = (score * q.shape[-1] ** -0.5 + bias).softmax(dim=1)
        out.append(torch.einsum('bkh,bkhd->bhd', weight, v[:, keys]).flatten(1))
    return torch.stack(out, dim=1)


CASES = [
    ((2, 3), 4, False, 0.5),
    ((2, 3), 4, True, 0.5),
    ((3, 2), 7, False, 0.6),  # padded: 24 and 16 are no multiples of 7
    ((3, 2), 7, True, 0.6),
    ((1, 2), 8, True, 0.5),  # one visible unit
]


@pytest.mark.parametrize(('units', 'window_size', 'shifted', 'ratio'), CASES)
@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('stage', [1, 2])
def test_values_and_gradients(units, window_size, shifted, ratio, backend, stage):
    hidden = random_mask(units[0] * units[1], ratio, np.random.default_rng(0))
    tokens = visible_tokens(UnitMask(units, hidden))[stage]
    cut = window_grid(tokens.grid, window_size, shifted, pad_small_map=True)
    plan = attention_plan(grouped_plan(tokens, cut), window_size, CPU)
    check(plan, cut, tokens.coords, window_size, backend)


@pytest.mark.parametrize('grid', [(8, 8), (5, 7)])
@pytest.mark.parametrize('shifted', [False, True])
@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('heads', [1, 2])  # one head: the bias broadcasts over all but a window
def test_dense_windows(grid, shifted, backend, heads):
    cut = window_grid(grid, 4, shifted)
    coords = np.stack(np.mgrid[: grid[0], : grid[1]], axis=-1).reshape(-1, 2)
    plan = dense_plan(cut, 4, CPU)
    check(plan, cut, coords, 4, backend, heads)


def check(plan, cut, coords, window_size, backend, heads=2):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return x.requires_grad_()

    inputs = random(2, len(coords), 24), random((2 * window_size - 1) ** 2, heads), random(24)
    qkv, table, padding = inputs
    rows = qkv
    if plan.padding is not None:
        rows = torch.cat([qkv, padding.expand(2, 1, -1)], dim=1)
    out = group_attention(rows, table, plan, backend)
    expected = slow_attention(qkv, table, cut, coords, window_size, padding)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    grads, wanted = (
        torch.autograd.grad((result * weight).sum(), inputs, materialize_grads=True)
        for result in (out, expected)
    )
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-10, atol=1e-12)


def test_index_is_timms():
    from timm.models.swin_transformer import get_relative_position_index

    for window_size in (1, 4, 7):
        expected = get_relative_position_index(window_size, window_size)
        assert torch.equal(relative_position_index(window_size), expected)


@pytest.mark.parametrize(
    ('shape', 'heads', 'backend', 'message'),
    [
        ((1, 15, 12), 2, 'recompute', '15 rows, the plan is for 16'),
        ((1, 16, 13), 2, 'sdpa', 'width 13'),
        ((1, 16, 12), 2, 'flash', "backend='flash' is unknown"),
    ],
)
def test_refuses(shape, heads, backend, message):
    plan = dense_plan(window_grid((4, 4), 4, False), 4, CPU)
    with pytest.raises(ValueError, match=message):
        group_attention(torch.zeros(shape), torch.zeros(49, heads), plan, backend=backend)
