"""Every recipe: two training steps and one validation, from the weights that it names."""

import math

import pytest
import torch
from recipe_runs import RECIPES, load, pretrained, run, short, shrink, start_of, untrained


@pytest.mark.parametrize('name', RECIPES)
def test_recipe_steps(name, place, tmp_path):
    cfg = shrink(load(name))
    path = start_of(cfg)
    weights = {} if path is None else pretrained(path, place)
    runner, start = run(short(cfg, tmp_path))

    for key, value in weights.items():
        # Windows of another size than those of pre-training: test_windows has the values.
        if key.startswith('backbone.') and key in start and start[key].shape == value.shape:
            torch.testing.assert_close(start[key], value, rtol=0, atol=0)
    if cfg.get('train_cfg'):
        assert runner.iter == 2
        assert math.isfinite(runner.message_hub.get_scalar('train/loss').current())
        assert not [one for one in untrained(runner) if one.startswith('backbone.')]
    if cfg.get('val_cfg') is not None or cfg.get('test_cfg') is not None:
        kind = 'val' if cfg.get('train_cfg') else 'test'
        scores = [n for n in runner.message_hub.log_scalars if n.startswith(f'{kind}/')]
        assert [one for one in scores if 'time' not in one], scores
