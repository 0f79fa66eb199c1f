"""Losses that are no numbers: what ends a run, and what is left out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import Runner
from small_runs import BATCH, STEPS, AtIteration, assert_same, config, train
from torch import nn

from greenmim_mm.engine.hooks import NonFiniteLossError
from greenmim_mm.engine.hooks.non_finite import first_non_finite


class PoisonedNorm(nn.LayerNorm):
    """Makes NaN of good input for a number of calls."""

    def __init__(self, *args, calls):
        super().__init__(*args)
        self.calls = calls

    def forward(self, x):
        self.calls -= 1
        return super().forward(x) * (float('nan') if self.calls >= 0 else 1.0)


def poison(runner, calls):
    norm = PoisonedNorm(64, calls=calls)
    norm.load_state_dict(runner.model.backbone.norm3.state_dict())
    runner.model.backbone.norm3 = norm


def test_loss_that_stays_bad_ends_the_run(folder, tmp_path):
    weights_before = {}

    def keep(runner):
        poison(runner, 100)
        weights_before.update({k: v.clone() for k, v in runner.model.state_dict().items()})

    AtIteration.actions = {1: keep}
    cfg = config(tmp_path, folder)
    runner = Runner.from_cfg(cfg)
    with pytest.raises(NonFiniteLossError) as error_info:
        runner.train()
    message = str(error_info.value)
    assert message.startswith('the loss is nan in iteration 5 (learning rate 0.001)')
    assert 'as in the 2 before it' in message and '\n' not in message
    assert 'first bad: module backbone.norm3 (PoisonedNorm)' in message
    named = message.partition('images: ')[2].split(', ')
    assert len(named) == BATCH and all(Path(path).parent == folder for path in named)
    # The bad steps have not reached the parameters.
    assert_same(runner.model.state_dict(), weights_before)


def test_two_bad_steps_are_left_out(folder, tmp_path):
    AtIteration.actions = {1: lambda runner: poison(runner, 2)}
    losses, final = train(config(tmp_path, folder))
    assert np.isnan([losses[2], losses[3]]).all()
    assert np.isfinite([v for k, v in losses.items() if k not in (2, 3)]).all()
    assert all(value.isfinite().all() for value in final.values())


class Scaler:
    """What a GPU's loss scaler does, from a scale that is much too large."""

    def __init__(self):
        self.value, self.left_out = 2.0**140, 0

    def scale(self, loss):
        return loss * self.value

    def step(self, optimizer):
        gradients = [p.grad for p in optimizer.param_groups[0]['params'] if p.grad is not None]
        torch._foreach_mul_(gradients, 1 / self.value)
        if all(gradient.isfinite().all() for gradient in gradients):
            optimizer.step()
        else:
            self.value /= 2**32
            self.left_out += 1

    def update(self, value):
        pass

    def state_dict(self):
        return {}


@OPTIM_WRAPPERS.register_module(force=True)
class MixedPrecision(AmpOptimWrapper):
    """mmengine's, which a CPU may have as well."""

    def __init__(self, **kwargs):
        OptimWrapper.__init__(self, **kwargs)
        self._scale_update_param, self.cast_dtype, self.loss_scaler = None, None, Scaler()


def test_steps_that_the_loss_scaler_leaves_out_are_no_bad_steps(folder, tmp_path, capfd):
    cfg = config(tmp_path, folder)
    cfg.optim_wrapper.type = 'mmengine.MixedPrecision'
    cfg.custom_hooks[2].max_bad_steps = 1
    cfg.experiment_name = 'mixed'
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.optim_wrapper.loss_scaler.left_out == 1
    assert sorted(AtIteration.losses) == list(range(3 * STEPS))
    assert 'left out' not in ''.join(capfd.readouterr())


def test_where_numbers_go_bad():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    x = torch.ones(1, 2)
    assert first_non_finite(model, lambda: model(x)) == ''
    assert first_non_finite(model, lambda: model(x).log() * float('nan')) == (
        'the loss itself, of outputs that are finite'
    )
    assert first_non_finite(model, lambda: model(x * float('inf'))) == 'module 0 (Linear)'
    with torch.no_grad():
        model[2].weight[0, 0] = float('nan')
    assert first_non_finite(model, lambda: model(x)) == 'parameter 2.weight'
    assert not any(module._forward_hooks for module in model.modules())
