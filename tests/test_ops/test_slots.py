"""Tokens into slots and back: the gathers of a compiler against those of autograd."""

import numpy as np
import pytest
import torch

from greenmim_mm.ops import (
    UnitMask,
    attention_plan,
    dense_plan,
    grouped_plan,
    random_mask,
    visible_tokens,
    window_grid,
)
from greenmim_mm.ops.slots import (
    compiled_into_slots,
    compiled_out_of_slots,
    into_slots,
    out_of_slots,
)

CPU = torch.device('cpu')


def packed_plan():
    """With slots that hold nothing."""
    hidden = random_mask(49, 0.75, np.random.default_rng(0))
    tokens = visible_tokens(UnitMask((7, 7), hidden))[1]
    plan = attention_plan(grouped_plan(tokens, window_grid(tokens.grid, 7, True)), 7, CPU)
    assert plan.padding is None and plan.idle is not None
    return plan


def whole_plan():
    plan = dense_plan(window_grid((8, 12), 4, True), 4, CPU)
    assert plan.padding is None and plan.idle is None
    return plan


@pytest.mark.parametrize('make', [packed_plan, whole_plan])
def test_compiled_gathers(make):
    plan = make()
    x = torch.randn(2, len(plan.slot), 3, 5, dtype=torch.float64, requires_grad=True)
    slots = into_slots(x, plan.token)
    weights = torch.randn_like(slots)
    if plan.idle is not None:  # nothing reads what is in them
        weights[:, :, plan.idle] = 0
    back = torch.randn_like(x)
    losses = []
    for into, out in (
        (compiled_into_slots(x, plan), lambda s: compiled_out_of_slots(s, plan)),
        (slots, lambda s: out_of_slots(s, plan.slot)),
    ):
        assert torch.equal(into, slots) and torch.equal(out(into), x)
        y = (into * weights).detach().requires_grad_()
        (grad_slots,) = torch.autograd.grad((out(y) * back).sum(), y)
        (grad_tokens,) = torch.autograd.grad((into * weights).sum(), x)
        losses.append((grad_slots, grad_tokens))
    torch.testing.assert_close(losses[0], losses[1])
