"""Recipes that use the weights: what the papers say, and what they start from."""

import copy
from functools import cache

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from recipe_runs import RECIPES, build, load, pretrained, shrink, start_of
from torch import nn

from greenmim_mm.benchmark.complexity import HollowModel

# Learning rate for 512 images, warm-up from, minimum, drop path, layer decay, windows, pixels.
FINETUNING = {
    'swin_transformer/swin-base-w7_greenmim-800e': (1.25e-3, 2.5e-7, 2.5e-7, 0.1, 0.9, 7, 224),
    'swin_transformer/swin-large-w14_greenmim-800e': (1e-3, 2e-7, 3.5e-7, 0.3, 0.8, 14, 224),
    'swin_transformer/swin-base-w6_simmim-100e': (1.25e-3, 2.5e-7, 2.5e-7, 0.1, 0.9, 6, 192),
    'swin_transformer/swin-base-w7_simmim-100e': (1.25e-3, 2.5e-7, 2.5e-7, 0.1, 0.9, 7, 224),
    'swin_transformer/swin-base-w7_simmim-800e': (1.25e-3, 2.5e-7, 2.5e-7, 0.1, 0.8, 7, 224),
    'swin_transformer/swin-large-w14_simmim-800e': (1.25e-3, 2.5e-7, 2.5e-7, 0.2, 0.7, 14, 224),
    'swin_transformer_v2/swinv2-base-w14_simmim-800e': (
        1.25e-3, 2.5e-7, 2.5e-7, 0.1, 0.75, 14, 224,
    ),
    'swin_transformer_v2/swinv2-base-w8_greenmim-200e': (
        1.25e-3, 2.5e-7, 2.5e-7, 0.1, 0.75, 8, 256,
    ),
}  # fmt: skip


def find(start: str) -> str:
    (recipe,) = [one for one in RECIPES if one.startswith(start)]
    return recipe


def test_all_finetuning_recipes_are_in_the_table():
    assert sorted(map(find, FINETUNING)) == [n for n in RECIPES if n.startswith('swin_transf')]


@pytest.mark.parametrize('start', FINETUNING)
def test_finetuning(start):
    rate, warm_from, minimum, drop_path, layer_decay, window, pixels = FINETUNING[start]
    cfg = load(find(start))
    optimizer, paramwise = cfg.optim_wrapper.optimizer, cfg.optim_wrapper.paramwise_cfg
    assert optimizer.lr == pytest.approx(rate * 2048 / 512)
    assert (optimizer.betas, optimizer.weight_decay) == ((0.9, 0.999), 0.05)
    assert cfg.optim_wrapper.clip_grad.max_norm == 5
    assert paramwise.layer_decay_rate == layer_decay
    warmup, cosine = cfg.param_scheduler
    assert (warmup.begin, warmup.end, cosine.begin, cosine.end, cosine.T_max) == (
        0,
        20,
        20,
        100,
        80,
    )
    assert cfg.train_cfg.max_epochs == 100
    assert warmup.start_factor * rate == pytest.approx(warm_from)
    assert cosine.eta_min == pytest.approx(minimum * 2048 / 512)
    backbone = cfg.model.backbone
    assert (backbone.drop_path_rate, backbone.img_size) == (drop_path, pixels)
    windows = backbone.window_size
    windows = (windows,) * 4 if isinstance(windows, int) else tuple(windows)
    assert windows == tuple(min(window, pixels // 4 >> stage) for stage in range(4))
    crop, flip, augment, erase = cfg.train_dataloader.dataset.pipeline[1:5]
    assert (crop.scale, crop.crop_ratio_range, crop.interpolation) == (pixels, (0.08, 1), 'bicubic')
    assert flip.type == 'RandomFlip' and flip.prob == 0.5
    assert (augment.policies, augment.magnitude_level, augment.magnitude_std) == (
        'timm_increasing', 9, 0.5,
    )  # fmt: skip
    assert (erase.erase_prob, erase.mode) == (0.25, 'rand')
    mixing = {one.type: one.alpha for one in cfg.model.train_cfg.augments}
    assert mixing == dict(Mixup=0.8, CutMix=1.0)
    assert cfg.model.head.loss.label_smooth_val == 0.1
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        resize, centre = loader.dataset.pipeline[1:3]
        assert centre.crop_size == pixels and resize.scale == int(pixels * 256 / 224)
    assert cfg.auto_scale_lr.base_batch_size == 8 * cfg.train_dataloader.batch_size == 2048


def test_linear_probe_trains_the_head_alone():
    cfg = load(find('benchmarks/swin-base-w7_greenmim-800e-pre_8xb2048'))
    optimizer = cfg.optim_wrapper.optimizer
    assert optimizer == dict(type='LARS', lr=6.4, weight_decay=0.0, momentum=0.9)
    assert cfg.auto_scale_lr.base_batch_size == 8 * cfg.train_dataloader.batch_size == 16384
    warmup, cosine = cfg.param_scheduler
    assert (warmup.end, cosine.begin, cosine.end, cfg.train_cfg.max_epochs) == (10, 10, 90, 90)
    cfg.model.backbone.init_cfg = None
    model = build(shrink(cfg))
    model.train()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ['head.fc.weight', 'head.fc.bias']
    assert not model.backbone.stages[3].training
    norm = model.neck[1].bn
    assert norm.weight is None and norm.training
    images = torch.randn(3, 3, 224, 224)
    pooled = model.backbone(images)[-1].mean((2, 3))
    expected = (pooled - pooled.mean(0)) / (pooled.var(0, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(model.extract_feat(images)[-1], expected, rtol=1e-3, atol=1e-4)
    model.init_weights()
    # A normal distribution of deviation 0.01, cut off at two (in mmengine's units, not sigmas).
    assert model.head.fc.weight.std().item() == pytest.approx(0.01, rel=0.05)


def _plain(node):
    """Without the marks of where mmengine has found a base, and what only this package has."""
    if isinstance(node, dict):
        if node.get('type') == 'greenmim_mm.PassOverBadImages':
            return _plain(node['transform'])
        return {key: _plain(value) for key, value in node.items() if key != '_scope_'}
    return [_plain(value) for value in node] if isinstance(node, (list, tuple)) else node


def test_both_detectors_compute_the_same():
    """mmdet's backbone and this package's, with the same weights, also on a small map."""
    backbones, rest = [], []
    for kind in ('swin', 'greenswin'):
        name = f'mask_rcnn/mask-rcnn_greenmim-{kind}-base-w7_fpn_amp-ms-crop-3x_coco'
        content = _plain(load(name).to_dict())
        content['optim_wrapper']['paramwise_cfg'] = None  # names that only one of them has
        content['model'].pop('backbone')
        # Names by which mmdet's bases are put together.
        for key in ('max_epochs', 'pretrained', 'scales', 'train_pipeline'):
            content.pop(key, None)
        rest.append(content)
        cfg = shrink(load(name))
        init_default_scope('mmdet')
        cfg.model.backbone.init_cfg = None
        backbones.append(MODELS.build(cfg.model.backbone).double())
        backbones[-1].eval()
    assert rest[0] == rest[1]
    stock, green = backbones
    generator = torch.Generator().manual_seed(0)
    for parameter in stock.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).double() * 0.1
    green.load_state_dict(stock.state_dict(), strict=True)
    images = torch.randn(1, 3, 104, 136, generator=generator).double()
    with torch.no_grad():
        for one, other in zip(stock(images), green(images), strict=True):
            torch.testing.assert_close(one, other)


def test_cascade_has_the_heads_of_swins_repository():
    cfg = load('cascade_rcnn/cascade-mask-rcnn_greenmim-greenswin-base-w7_fpn_amp-ms-crop-3x_coco')
    stds = []
    for head in cfg.model.roi_head.bbox_head:
        assert (head.num_shared_convs, head.num_shared_fcs) == (4, 1)
        assert (head.conv_out_channels, head.fc_out_channels) == (256, 1024)
        assert head.norm_cfg.type == 'SyncBN' and not head.reg_class_agnostic
        assert head.reg_decoded_bbox and head.loss_bbox == dict(type='GIoULoss', loss_weight=10.0)
        stds.append(head.bbox_coder.target_stds)
    assert stds == [[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]]


@pytest.mark.parametrize('epochs', [12, 36])
def test_dino(epochs):
    cfg = load(f'dino/dino-5scale_greenmim-greenswin-large-w12_8xb2-{epochs}e_coco')
    optimizer = cfg.optim_wrapper
    assert (optimizer.optimizer.lr, optimizer.optimizer.weight_decay) == (1e-4, 1e-4)
    assert optimizer.paramwise_cfg.custom_keys.backbone.lr_mult == 0.1
    assert optimizer.clip_grad.max_norm == 0.1
    assert (cfg.auto_scale_lr.base_batch_size, cfg.train_cfg.max_epochs) == (16, epochs)
    assert cfg.param_scheduler[0].milestones == ([11] if epochs == 12 else [27, 33])
    backbone = cfg.model.backbone
    assert (backbone.window_size, backbone.drop_path_rate, backbone.with_cp) == (12, 0.2, True)
    assert cfg.model.num_feature_levels == cfg.model.neck.num_outs == 5


def test_upernet():
    cfg = load('upernet/upernet_greenmim-greenswin-base-w7_8xb2-amp-160k_ade20k-512x512')
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.lr, optimizer.weight_decay) == (6e-5, 0.01)
    warmup, linear = cfg.param_scheduler
    assert (warmup.start_factor, warmup.end, linear.power, linear.end) == (1e-6, 1500, 1.0, 160000)
    assert cfg.train_cfg.max_iters == 160000 and cfg.auto_scale_lr.base_batch_size == 16
    assert cfg.model.backbone.drop_path_rate == 0.3
    assert cfg.model.auxiliary_head.loss_decode.loss_weight == 0.4
    assert cfg.model.data_preprocessor.size == (512, 512)


@cache
def hollow(name: str) -> nn.Module:
    """The backbone of a recipe at full size, without values."""
    cfg = load(name)
    init_default_scope(cfg.default_scope)
    return HollowModel(cfg.model.backbone).module


@pytest.mark.parametrize('name', RECIPES)
def test_starts_from_a_recipe_of_pretraining(name):
    """The checkpoint is the last one of a recipe, of the same network and, for V2, its windows."""
    cfg = load(name)
    path = start_of(cfg)
    if path is None:
        assert name.startswith(('greenmim/', 'simmim/', 'custom/greenmim')) or 'knn' in name
        return
    _, folder, file = path.split('/')
    (recipe,) = [one for one in RECIPES if one.endswith(f'/{folder}')]
    before = load(recipe)
    assert file == f'epoch_{before.train_cfg.max_epochs}.pth'
    ours, theirs = hollow(name), hollow(recipe)
    shapes = [
        (one.patch_embed.projection.out_channels, [len(stage.blocks) for stage in one.stages])
        for one in (ours, theirs)
    ]
    assert shapes[0] == shapes[1]
    if 'V2' not in type(ours).__name__:
        return
    windows = getattr(theirs, 'window_sizes', None) or [
        stage.blocks[0].attn.w_msa.window_size[0] for stage in theirs.stages
    ]
    told = tuple(
        before or now
        for before, now in zip(ours.pretrained_window_sizes, ours.window_sizes, strict=True)
    )
    assert told == tuple(windows)


def test_weights_of_other_windows_are_resized(place):
    """From windows of 6 tokens to 7: the recipe for SimMIM's own weights."""
    name = find('swin_transformer/swin-base-w7_simmim-100e')
    cfg = shrink(load(name))
    weights = copy.copy(pretrained(start_of(cfg), place))
    model = build(cfg)
    model.init_weights()
    key = 'backbone.stages.0.blocks.0.attn.w_msa.relative_position_bias_table'
    assert weights[key].shape == (121, 1) and model.state_dict()[key].shape == (169, 1)
    table = weights[key].t().reshape(1, 1, 11, 11)
    expected = nn.functional.interpolate(table, (13, 13), mode='bicubic')
    torch.testing.assert_close(model.state_dict()[key], expected.reshape(1, 169).t())


def test_weights_of_another_network_are_refused(place):
    from greenmim_mm.checkpoint import CheckpointError

    cfg = shrink(load(find('swin_transformer/swin-base-w7_simmim-100e')))
    pretrained(start_of(cfg), place)
    cfg.model.backbone.arch.embed_dims *= 2
    cfg.model.head.in_channels *= 2
    with pytest.raises(CheckpointError, match='does not fit'):
        build(cfg).init_weights()
