"""The config of a run: a recipe of this project with the plan's settings in it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction

from ...fileio import atomic_path
from ..errors import UserError
from ..overrides import merge_options
from ..recipes import find_recipe
from .plan import Plan

_RECIPES = {
    1: 'greenmim/greenmim_swin-base-w7_8xb256-amp-coslr-200e_in1k.py',
    2: 'greenmim/greenmim_swinv2-base-w8_8xb256-amp-coslr-200e_in1k-256px.py',
}
_CHECKPOINTS = 100


def make_config(plan: Plan) -> Config:
    """The config that ``greenmim train`` and tools/train.py run as well.

    Args:
        plan: The settings.

    Raises:
        UserError: If a setting of ``plan.cfg_options`` does not exist.
    """
    cfg = Config.fromfile(find_recipe(_RECIPES[plan.version]))
    cfg.pop('train_pipeline', None)  # a variable of the recipe
    arch = dict(plan.arch)
    windows = set(plan.windows)
    cfg.model.backbone.update(
        # In full, so that its parts can be changed.
        arch=arch,
        img_size=plan.image_size,
        window_size=windows.pop() if len(windows) == 1 else plan.windows,
    )
    cfg.model.neck.embed_dim = 8 * arch['embed_dims']
    _set_data(cfg, plan)
    _set_schedule(cfg, plan)
    cfg.optim_wrapper = _optim_wrapper(cfg.optim_wrapper, plan)
    cfg.default_hooks.checkpoint.update(
        interval=max(plan.epochs // _CHECKPOINTS, 1), folder='checkpoints'
    )
    cfg.randomness = dict(seed=plan.seed)
    if plan.compile:
        cfg.compile = True
    merge_options(cfg, parse_options(plan.cfg_options))
    return cfg


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Values of ``KEY=VALUE`` settings, read as mmengine reads them."""
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition('=')
        if not equals:
            raise UserError(f'--cfg-options {pair!r}: give KEY=VALUE')
        options[key] = DictAction._parse_iterable(value)
    return options


def _set_data(cfg: Config, plan: Plan) -> None:
    loader = cfg.train_dataloader
    loader.update(
        batch_size=plan.device_batch,
        num_workers=plan.workers,
        persistent_workers=plan.workers > 0,
        pin_memory=plan.on_gpu,
        drop_last=True,
    )
    loader.dataset.update(
        data_root=list(plan.data),
        data_prefix='',
        max_bad=plan.max_bad,
    )
    for step in loader.dataset.pipeline:
        if step.type == 'greenmim_mm.LoadRandomResizedCrop':
            step.scale = plan.image_size


def _set_schedule(cfg: Config, plan: Plan) -> None:
    total, warmup = plan.epochs * plan.steps_per_epoch, plan.warmup_steps
    cosine = dict(
        type='CosineAnnealingLR', T_max=total - warmup, by_epoch=False, begin=warmup, end=total
    )
    rise = dict(type='LinearLR', start_factor=1e-4, by_epoch=False, begin=0, end=warmup)
    cfg.param_scheduler = [rise, cosine] if warmup else [cosine]
    cfg.train_cfg = dict(
        type='greenmim_mm.MicroBatchTrainLoop', max_epochs=plan.epochs, accumulate=plan.accumulate
    )
    # The plan has scaled it.
    cfg.auto_scale_lr = dict(enable=False, base_batch_size=plan.batch_size)


def _optim_wrapper(recipe: dict[str, Any], plan: Plan) -> dict[str, Any]:
    wrapper = dict(recipe, optimizer=dict(recipe['optimizer'], lr=plan.lr))
    if plan.precision == 'fp32':
        return wrapper | dict(type='OptimWrapper')
    # The scaler also leaves steps out whose gradients are not finite: of use in bf16, too.
    dtype = {'bf16': 'bfloat16', 'fp16': 'float16'}[plan.precision]
    return wrapper | dict(type='AmpOptimWrapper', dtype=dtype, loss_scale='dynamic')


def dump(cfg: Config, path: Path) -> None:
    """Write a config whole or not at all."""
    with atomic_path(path, force=True) as temporary:
        cfg.dump(temporary)
