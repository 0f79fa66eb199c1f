"""The norm of the gradients in the log."""

import json

import pytest
import torch
from small_runs import STEPS, config, train
from torch.optim.optimizer import register_optimizer_step_pre_hook

from greenmim_mm.compat import compiles_plans
from greenmim_mm.engine.hooks.gradient_norm import gradient_norm


def hooks_are_called() -> bool:
    """Where TorchDynamo of torch 2.1 was used before, it has taken the hooks off optimisers."""
    parameter, called = torch.nn.Parameter(torch.ones(1)), []
    parameter.grad = torch.ones(1)
    optimizer = torch.optim.AdamW([parameter])
    optimizer.register_step_pre_hook(lambda *_: called.append(True))
    optimizer.step()
    return bool(called)


def test_gradient_norm_is_logged(folder, tmp_path):
    if not compiles_plans() and not hooks_are_called():
        pytest.skip('another test has used TorchDynamo of torch 2.1')
    norms = []

    def measure(optimizer, args, kwargs):
        norms.append(
            sum(
                float((p.grad.double() ** 2).sum())
                for group in optimizer.param_groups
                for p in group['params']
                if p.grad is not None
            )
            ** 0.5
        )

    handle = register_optimizer_step_pre_hook(measure)
    cfg = config(tmp_path, folder, epochs=1)
    cfg.log_processor = dict(window_size=1)
    train(cfg)
    handle.remove()
    (file,) = tmp_path.glob('*/vis_data/scalars.json')
    logged = [json.loads(line)['grad_norm'] for line in file.read_text().splitlines()]
    assert logged == pytest.approx(norms, rel=1e-5) and len(logged) == STEPS
    half = [torch.full((3, 5), 100.0, dtype=torch.float16), torch.ones(4)]
    assert float(gradient_norm(half)) == pytest.approx((15 * 1e4 + 4) ** 0.5)
