"""Pre-training recipes say what the papers say, and the pairs differ in the method alone."""

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from recipe_runs import RECIPES, SMALL, build, load, shrink
from torch import nn

from greenmim_mm.benchmark.complexity import HollowModel

GREENMIM = [name for name in RECIPES if name.split('/')[1].startswith('greenmim_')]
SIMMIM = [name for name in RECIPES if name.startswith('simmim/')]
PAIRS = [name for name in SIMMIM if name.replace('simmim', 'greenmim') in GREENMIM]
# Learning rate for each 256 images, epochs, warm-up: as GreenMIM's authors ran it.
AUTHORS = {
    'greenmim_swin-base-w7_8xb256-amp-coslr-200e_in1k': (1.5e-4, 200, (7, 7, 7, 7)),
    'greenmim_swin-base-w7_8xb256-amp-coslr-800e_in1k': (1e-4, 800, (7, 7, 7, 7)),
    'greenmim_swin-base-w14_8xb256-amp-coslr-800e_in1k': (1.5e-4, 800, (14, 14, 14, 7)),
    'greenmim_swin-large-w14_8xb256-amp-coslr-800e_in1k': (1e-4, 800, (14, 14, 14, 7)),
}
# Learning rate for each 512 images, epochs, windows: as SimMIM's authors ran it.
SIMMIM_AUTHORS = {
    'simmim_swin-base-w6_8xb256-amp-coslr-100e_in1k-192px': (2e-4, 100, 6),
    'simmim_swin-base-w6_8xb256-amp-steplr-800e_in1k-192px': (1e-4, 800, 6),
    'simmim_swin-large-w12_8xb256-amp-steplr-800e_in1k-192px': (1e-4, 800, 12),
    'simmim_swinv2-base-w12_8xb256-amp-steplr-800e_in1k-192px': (1e-4, 800, 12),
}


def find(name: str) -> str:
    (recipe,) = [one for one in RECIPES if one.endswith(f'/{name}')]
    return recipe


def test_names():
    assert len(PAIRS) == 4 and len(SIMMIM) == len(PAIRS) + len(SIMMIM_AUTHORS)
    assert len(GREENMIM) == 13


@pytest.mark.parametrize('name', GREENMIM)
def test_greenmim_schedule(name):
    cfg = load(name)
    recipe = name.split('/')[1]
    batch = 128 if '1xb128' in name else 2048
    rate, epochs, windows = AUTHORS.get(recipe, (1.5e-4, cfg.train_cfg.max_epochs, None))
    warmup, cosine = cfg.param_scheduler
    assert f'-{epochs}e_' in recipe and cfg.train_cfg.max_epochs == epochs
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(rate * batch / 256)
    assert cfg.optim_wrapper.optimizer.betas == (0.9, 0.95)
    assert 'clip_grad' not in cfg.optim_wrapper
    assert (warmup.begin, warmup.end) == (0, cosine.begin) == (0, 10 if '1xb128' in name else 40)
    assert cosine.end == epochs == cosine.begin + cosine.T_max and not cosine.get('eta_min')
    assert cfg.auto_scale_lr.base_batch_size == batch
    assert batch == cfg.train_dataloader.batch_size * (1 if '1xb128' in name else 8)
    assert cfg.train_dataloader.drop_last == ('custom' not in name)
    assert cfg.model.mask_ratio == 0.75
    assert cfg.randomness.seed == 0 and cfg.default_hooks.checkpoint.max_keep_ckpts == 3
    size = cfg.model.backbone.window_size
    if windows is not None:
        assert (tuple(size) if isinstance(size, (tuple, list)) else (size,) * 4) == windows


@pytest.mark.parametrize('name', SIMMIM_AUTHORS)
def test_simmim_as_its_authors_ran_it(name):
    rate, epochs, window = SIMMIM_AUTHORS[name]
    cfg = load(find(name))
    optimizer = cfg.optim_wrapper.optimizer
    assert optimizer.lr == pytest.approx(rate * 4)
    assert (optimizer.betas, optimizer.weight_decay) == ((0.9, 0.999), 0.05)
    assert cfg.optim_wrapper.clip_grad.max_norm == 5
    assert cfg.train_cfg.max_epochs == epochs
    warmup, main = cfg.param_scheduler
    assert (warmup.begin, warmup.end) == (0, 10)
    assert warmup.start_factor * rate == pytest.approx(1e-6 if epochs == 100 else 5e-7)
    if epochs == 100:
        assert main.type == 'CosineAnnealingLR' and (main.begin, main.end) == (10, 100)
        assert main.eta_min == pytest.approx(1e-5 * 4) and main.T_max == 90
    else:
        assert main.type == 'MultiStepLR' and (main.milestones, main.gamma) == ([700], 0.1)
    crop, mask = cfg.train_dataloader.dataset.pipeline[0], cfg.train_dataloader.dataset.pipeline[2]
    assert (crop.scale, crop.crop_ratio_range, crop.interpolation) == (192, (0.67, 1), 'bilinear')
    assert (mask.input_size, mask.mask_ratio, mask.mask_patch_size) == (192, 0.6, 32)
    backbone = cfg.model.backbone
    assert backbone.drop_path_rate == (0.1 if 'v2' in name else 0.0)
    init_default_scope(cfg.default_scope)
    model = HollowModel(cfg.model).module
    table = model.backbone.stages[0].blocks[0].attn.w_msa
    assert table.window_size == (window, window)
    last = model.backbone.stages[3].blocks[0].attn.w_msa
    assert last.window_size == (min(window, 6),) * 2
    assert getattr(model.head, 'norm_size', None) == (47 if 'v2' in name else None)


@pytest.mark.parametrize('name', [*GREENMIM, *SIMMIM])
def test_only_matrices_decay(name):
    cfg = load(name)
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    cfg.optim_wrapper.type = 'OptimWrapper'
    model = build(shrink(cfg))
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {
        names[id(parameter)]: group['weight_decay']
        for group in optimizer.param_groups
        for parameter in group['params']
    }
    assert decay.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    norms = {n for n, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    assert 'backbone.patch_embed.norm' in norms
    for parameter, value in decay.items():
        owner, _, leaf = parameter.rpartition('.')
        free = leaf in ('bias', 'relative_position_bias_table', 'mask_token') or owner in norms
        free |= leaf in ('q_bias', 'v_bias', 'logit_scale') or 'cpb_mlp' in owner
        assert value == (0.0 if free else 0.05), parameter


@pytest.mark.parametrize('name', GREENMIM)
def test_weights_start_xavier_uniform(name):
    """All linear layers and the patch convolution; no value passes the bound."""
    model = build(shrink(load(name)))
    model.init_weights()
    backbone = model.backbone
    block = backbone.stages[2].blocks[0]
    for weight in (
        block.ffn.layers[1].weight,
        block.attn.w_msa.proj.weight,
        block.attn.w_msa.qkv.weight,
        backbone.patch_embed.projection.weight,
    ):
        fan_out, fan_in = weight.shape[0] * weight[0, 0].numel(), weight[0].numel()
        bound = (6 / (fan_in + fan_out)) ** 0.5
        assert 0.9 * bound < weight.abs().max() <= bound
        # A uniform distribution, not a normal one cut off.
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


@pytest.mark.parametrize('name', PAIRS)
def test_baseline_differs_in_the_method_alone(name):
    ours, theirs = (load(one).to_dict() for one in (name.replace('simmim', 'greenmim'), name))
    models = ours.pop('model'), theirs.pop('model')
    loaders = ours['train_dataloader'], theirs['train_dataloader']
    pipelines = [loader['dataset'].pop('pipeline') for loader in loaders]
    for one in (ours, theirs):
        one.pop('train_pipeline')
    assert ours == theirs
    mask = pipelines[1].pop(2)
    assert mask['type'] == 'SimMIMMaskGenerator' and pipelines[0] == pipelines[1]
    assert models[0]['data_preprocessor'] == models[1]['data_preprocessor']
    backbones = [model['backbone'] for model in models]
    assert mask['input_size'] == pipelines[0][0]['scale']
    assert {backbone['img_size'] for backbone in backbones} == {mask['input_size']}
    for key in ('arch', 'drop_path_rate'):
        assert backbones[0][key] == backbones[1][key]
    # The networks are the same: one's weights are the other's.
    init_default_scope('mmpretrain')
    for backbone in backbones:
        extra = dict(extra_norm_every_n_blocks=0) if 'V2' in backbone['type'] else {}
        backbone['arch'] = SMALL | extra
    green, sim = (MODELS.build(backbone) for backbone in backbones)
    green.eval()
    sim.eval()
    sim.load_state_dict(dict(green.state_dict(), mask_token=sim.mask_token), strict=False)
    images = torch.randn(1, 3, mask['input_size'], mask['input_size'])
    with torch.no_grad():
        torch.testing.assert_close(green(images), sim(images, None), rtol=1e-4, atol=1e-4)


def slow_normalised(image, size):
    """Each pixel on its own, with the variance as torch has it for a list of numbers."""
    out = torch.empty_like(image)
    reach = size // 2
    for channel in range(image.shape[0]):
        for row in range(image.shape[1]):
            for column in range(image.shape[2]):
                square = image[
                    channel,
                    max(0, row - reach) : row + reach + 1,
                    max(0, column - reach) : column + reach + 1,
                ]
                deviation = (square.var() + 1e-6).sqrt()
                out[channel, row, column] = (
                    image[channel, row, column] - square.mean()
                ) / deviation
    return out


@pytest.mark.parametrize('size', [3, 7])
def test_targets_relative_to_the_pixels_around(size):
    from greenmim_mm.models.simmim_head import normalise_locally

    images = torch.randn(2, 3, 9, 6, generator=torch.Generator().manual_seed(0)).double()
    expected = torch.stack([slow_normalised(image, size) for image in images])
    torch.testing.assert_close(normalise_locally(images, size), expected)


def test_head_measures_the_hidden_pixels_of_normalised_targets():
    from greenmim_mm.models.simmim_head import SimMIMNormHead, normalise_locally

    loss = dict(type='mmpretrain.PixelReconstructionLoss', criterion='L1', channel=3)
    head = SimMIMNormHead(4, loss, norm_size=5)
    generator = torch.Generator().manual_seed(0)
    images, painted = (torch.randn(2, 3, 16, 16, generator=generator) for _ in range(2))
    mask = (torch.rand(2, 4, 4, generator=generator) < 0.6).float()
    hidden = (
        mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].bool().expand(-1, 3, -1, -1)
    )
    expected = (painted - normalise_locally(images, 5)).abs()[hidden].mean()
    torch.testing.assert_close(head.loss(painted, images, mask), expected)
    with pytest.raises(ValueError, match='norm_size=4 must be odd'):
        SimMIMNormHead(4, loss, norm_size=4)
