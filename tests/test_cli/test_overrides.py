"""--cfg-options: what exists or is known is set, what is misspelt is refused by name."""

from pathlib import Path

import pytest
from mmengine.config import Config

from greenmim_mm.cli import runs
from greenmim_mm.cli.errors import UserError
from greenmim_mm.cli.overrides import merge_options

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {
    'greenmim': ROOT / 'configs/greenmim/greenmim_swin-base-w7_8xb256-amp-coslr-200e_in1k.py',
    'mmdet': runs.find_config('mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'),
    'mmpretrain': runs.find_config('mmpretrain::mobilenet_v2/mobilenet-v2_8xb32_in1k.py'),
}


@pytest.fixture(scope='module')
def configs():
    return {name: Config.fromfile(path) for name, path in CONFIGS.items()}


@pytest.mark.parametrize(
    ('name', 'key', 'near'),
    [
        ('greenmim', 'train_datloader.batch_size', 'train_dataloader'),
        ('greenmim', 'train_dataloader.batchsize', 'batch_size'),
        ('greenmim', 'train_dataloader.dataset.dataroot', 'data_root'),
        ('greenmim', 'train_dataloader.dataset.pipeline.0.scal', 'scale'),
        ('greenmim', 'model.backbone.windw_size', 'window_size'),
        ('greenmim', 'model.mask_rato', 'mask_ratio'),
        ('greenmim', 'optim_wrapper.optimizer.betass', 'betas'),
        ('greenmim', 'optim_wrapper.acumulative_counts', 'accumulative_counts'),
        ('greenmim', 'train_cfg.max_epoch', 'max_epochs'),
        ('greenmim', 'param_scheduler.0.star_factor', 'start_factor'),
        ('greenmim', 'default_hooks.checkpoint.intervall', 'interval'),
        ('greenmim', 'auto_scale_lr.base_batch', 'base_batch_size'),
        ('greenmim', 'find_unused_params', 'find_unused_parameters'),
        ('mmdet', 'model.backbone.wndow_size', 'window_size'),
        ('mmdet', 'model.rpn_head.feat_channel', 'feat_channels'),
        ('mmdet', 'test_evaluator.metrics', 'metric'),
        ('mmpretrain', 'model.head.num_class', 'num_classes'),
        ('mmpretrain', 'val_evaluator.topkk', 'topk'),
    ],
)
def test_misspelt(configs, name, key, near):
    cfg = configs[name].copy()
    place, _, last = key.rpartition('.')
    wrong = key.split('.')[0] if key.startswith('train_datloader') else last
    with pytest.raises(UserError) as error_info:
        merge_options(cfg, {key: 1})
    message = str(error_info.value)
    assert message.startswith(f'--cfg-options {key}: ') and f'no {wrong!r}' in message
    assert message.endswith(f'did you mean {near}?')


def test_nothing_near(configs):
    with pytest.raises(UserError, match=r'auto_scale_lr has no .zzz.; it may have base_batch_size'):
        merge_options(configs['greenmim'].copy(), {'auto_scale_lr.zzz': 1})


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        ('greenmim', {'model.backbone.with_cp': 'mlp', 'model.backbone.img_size': 192}),
        ('greenmim', {'model.backbone.init_cfg.0.type': 'Pretrained'}),
        ('greenmim', {'optim_wrapper.accumulative_counts': 4}),
        ('greenmim', {'optim_wrapper.type': 'AmpOptimWrapper', 'optim_wrapper.loss_scale': 1.0}),
        ('greenmim', {'optim_wrapper.paramwise_cfg.custom_keys.norm9.decay_mult': 0.0}),
        ('greenmim', {'optim_wrapper.clip_grad.max_norm': 5.0}),
        ('greenmim', {'train_dataloader.drop_last': True, 'train_dataloader.num_workers': 0}),
        ('greenmim', {'train_cfg.val_interval': 2, 'train_cfg.val_begin': 3}),
        ('greenmim', {'default_hooks.mine.type': 'EMAHook', 'default_hooks.mine.momentum': 0.1}),
        ('greenmim', {'default_hooks.checkpoint.save_best': 'auto', 'env_cfg.new': 1}),
        ('greenmim', {'randomness.seed': 1, 'randomness.deterministic': True}),
        ('greenmim', {'param_scheduler.0.end_factor': 0.9, 'sync_bn': 'torch'}),
        ('greenmim', {'model_wrapper_cfg.static_graph': True, 'compile.mode': 'default'}),
        ('greenmim', {'train_dataloader.dataset.pipeline.0.max_pixels': 10**6}),
        ('greenmim', {'train_dataloader.dataset.max_refetch': 5, 'val_dataloader': None}),
        ('mmdet', {'model.test_cfg.rcnn.mask_thr': 0.5, 'model.roi_head.bbox_head.num_classes': 2}),
        ('mmdet', {'model.backbone.with_cp': True, 'test_evaluator.classwise': True}),
        ('mmdet', {'train_dataloader.dataset.indices': 10, 'tta_model.type': 'DetTTAModel'}),
        ('mmpretrain', {'model.backbone.frozen_stages': 2, 'model.head.loss.use_sigmoid': True}),
    ],
)
def test_known(configs, name, options):
    cfg = configs[name].copy()
    merge_options(cfg, options)
    for key, value in options.items():
        node = cfg
        for part in key.split('.'):
            node = node[int(part)] if isinstance(node, list) else node[part]
        assert node == value


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'param_scheduler.9.end': 1}, 'param_scheduler is a list of 2; give a number below 2'),
        ({'param_scheduler.end': 1}, "in the place of 'end'"),
        ({'train_cfg.max_epochs.foo': 1}, 'train_cfg.max_epochs is 200 in the config and has no'),
    ],
)
def test_dead_ends(configs, options, message):
    with pytest.raises(UserError, match=message):
        merge_options(configs['greenmim'].copy(), options)


def test_unknown_class_takes_anything(configs):
    cfg = configs['greenmim'].copy()
    merge_options(cfg, {'model.backbone.type': 'somewhere.Else', 'model.backbone.windw_size': 1})
    assert cfg.model.backbone.windw_size == 1
    merge_options(cfg, {'optim_wrapper.type': 'NotInstalled', 'optim_wrapper.its_own': 1})
    assert cfg.optim_wrapper.its_own == 1
