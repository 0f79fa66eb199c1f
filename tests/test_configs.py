"""Every recipe: it parses, builds, decays what it should, and trains a step on small data."""

import importlib
import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.fileio import load
from mmengine.logging import MessageHub, MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(
    path.relative_to(ROOT / 'configs').as_posix()
    for path in ROOT.glob('configs/*/*.py')
    if path.parent.name not in ('_base_', 'demo')
    # Another recipe under a strategy of sharding: test_models/test_sharding.py.
    and not path.stem.endswith(('_fsdp', '_deepspeed-zero2'))
)
BASE = 'greenmim/greenmim_swin-base-w7_8xb256-amp-coslr-200e_in1k.py'
LARGE = 'greenmim/greenmim_swin-large-w14_8xb256-amp-coslr-200e_in1k.py'
TINY = 'greenmim/greenmim_swin-tiny-w7_1xb128-amp-coslr-100e_custom.py'
V2_BASE = 'greenmim/greenmim_swinv2-base-w8_8xb256-amp-coslr-200e_in1k-256px.py'
V2_LARGE = 'greenmim/greenmim_swinv2-large-w12_8xb256-amp-coslr-200e_in1k-192px.py'
# Each differs from a recipe of GreenMIM in the method alone.
SIMMIM = {
    'simmim/simmim_swin-base-w7_8xb256-amp-coslr-200e_in1k.py': BASE,
    'simmim/simmim_swin-large-w14_8xb256-amp-coslr-200e_in1k.py': LARGE,
    'simmim/simmim_swinv2-base-w8_8xb256-amp-coslr-200e_in1k-256px.py': V2_BASE,
    'simmim/simmim_swinv2-large-w12_8xb256-amp-coslr-200e_in1k-192px.py': V2_LARGE,
}
PRETRAINING = [BASE, LARGE, TINY, V2_BASE, V2_LARGE, *SIMMIM]
STOCK = 'mask_rcnn/mask-rcnn_greenmim-swin-base-w7_fpn_amp-ms-crop-3x_coco.py'
GREEN = 'mask_rcnn/mask-rcnn_greenmim-greenswin-base-w7_fpn_amp-ms-crop-3x_coco.py'
GREEN_V2 = 'mask_rcnn/mask-rcnn_greenmim-swinv2-base-w8_fpn_amp-ms-crop-3x_coco.py'
BACKBONE_PARAMETERS = {
    # The published size of Swin's backbone, here with one norm for each output.
    BASE: 86_743_224,
    LARGE: 195_257_556,
    TINY: 27_519_354,
    # The published sizes of Swin V2, 87.9 M and 196.7 M, have the head for 1000 classes.
    V2_BASE: 86_893_816,
    V2_LARGE: 195_202_932,
    # As GreenMIM's, and a mask token.
    **dict(zip(SIMMIM, (86_743_352, 195_257_748, 86_893_944, 195_203_124), strict=True)),
    STOCK: 86_743_224 + 2 * (128 + 256 + 512),
    GREEN: 86_743_224 + 2 * (128 + 256 + 512),
    GREEN_V2: 86_893_816 + 2 * (128 + 256 + 512),
}
SMALL = dict(embed_dims=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))


@pytest.fixture(autouse=True)
def no_traces_of_the_runner():
    """A runner's seed and iteration would reach the masks of later tests."""
    yield
    for manager in (MessageHub, DefaultScope, MMLogger, Visualizer):
        manager._instance_dict.clear()


@pytest.fixture
def train_tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    return importlib.import_module('train')


@pytest.fixture(scope='module')
def imagenet(tmp_path_factory):
    """``<root>/train/<class>/*.JPEG``: two classes of two images."""
    root = tmp_path_factory.mktemp('imagenet')
    rng = np.random.default_rng(0)
    for name in ('n01440764', 'n01443537'):
        folder = root / 'train' / name
        folder.mkdir(parents=True)
        for index in range(2):
            image = rng.integers(0, 256, (90 + 30 * index, 110, 3), np.uint8)
            assert cv2.imwrite(str(folder / f'{name}_{index}.JPEG'), image)
    return root


@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    """COCO's layout: one annotated image."""
    root = tmp_path_factory.mktemp('coco')
    (root / 'annotations').mkdir()
    rng = np.random.default_rng(0)
    (root / 'train2017').mkdir()
    image = rng.integers(0, 256, (96, 96, 3), np.uint8)
    assert cv2.imwrite(str(root / 'train2017' / '000000000001.jpg'), image)
    content = dict(
        images=[dict(id=1, file_name='000000000001.jpg', height=96, width=96)],
        annotations=[
            dict(
                id=1,
                image_id=1,
                category_id=18,
                iscrowd=0,
                area=3000,
                bbox=[20, 20, 50, 60],
                segmentation=[[20, 20, 70, 20, 70, 80, 20, 80]],
            )
        ],
        categories=[dict(id=18, name='dog')],
    )
    (root / 'annotations' / 'instances_train2017.json').write_text(json.dumps(content))
    return root


def build(cfg: Config) -> nn.Module:
    init_default_scope(cfg.default_scope)
    return MODELS.build(cfg.model)


def shrink(cfg: Config) -> None:
    """Fewer and narrower blocks; everything else stays as the recipe has it."""
    backbone, neck = cfg.model.backbone, cfg.model.neck
    if 'V2' in backbone.type:
        backbone.arch = dict(SMALL, extra_norm_every_n_blocks=0)
    elif 'arch' in backbone:
        backbone.arch = SMALL
    else:
        backbone.update(SMALL)
    if 'embed_dim' in neck:
        neck.embed_dim = SMALL['embed_dims'] * 8
    elif neck.type == 'SimMIMLinearDecoder':
        neck.in_channels = SMALL['embed_dims'] * 8
    else:
        neck.in_channels = [SMALL['embed_dims'] << stage for stage in range(4)]


def untrained(runner: Runner) -> list[str]:
    """Parameters without a gradient: AdamW keeps no state for them."""
    state = runner.optim_wrapper.optimizer.state
    return [name for name, p in runner.model.named_parameters() if p not in state]


def test_all_recipes_are_covered():
    assert set(BACKBONE_PARAMETERS) == set(CONFIGS)


@pytest.mark.parametrize('name', CONFIGS)
def test_model_builds_and_decays_only_matrices(name):
    cfg = Config.fromfile(ROOT / 'configs' / name)
    assert cfg.default_scope == ('mmdet' if name.startswith('mask_rcnn') else 'mmpretrain')
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    model = build(cfg)
    assert sum(p.numel() for p in model.backbone.parameters()) == BACKBONE_PARAMETERS[name]

    cfg.optim_wrapper.type = 'OptimWrapper'
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay, rates = {}, set()
    for group in optimizer.param_groups:
        rates.add(group['lr'])
        for parameter in group['params']:
            decay[names[id(parameter)]] = group['weight_decay']
    assert decay.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(decay.values()) == {0.0, 0.05}
    if name.startswith('mask_rcnn'):
        assert rates == {1e-4}
        # mmdet's recipe, whose biases decay.
        free = ('norm', 'relative_position_bias_table', 'cpb_mlp', 'logit_scale')
        assert {n for n, d in decay.items() if not d} == {
            n for n in decay if any(key in n for key in free)
        }
        return
    images = 128 if name == TINY else 2048
    assert rates == {1.5e-4 * images / 256}
    assert cfg.auto_scale_lr.base_batch_size == images
    assert optimizer.defaults['betas'] == (0.9, 0.95)
    norms = {n for n, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    assert 'backbone.patch_embed.norm' in norms
    for parameter, value in decay.items():
        owner, _, leaf = parameter.rpartition('.')
        free = leaf in ('bias', 'relative_position_bias_table', 'mask_token') or owner in norms
        free |= leaf in ('q_bias', 'v_bias', 'logit_scale') or 'cpb_mlp' in owner
        assert value == (0.0 if free else 0.05), parameter
    assert decay['backbone.mask_token' if name in SIMMIM else 'neck.mask_token'] == 0
    stage = 1 if 'swinv2' in name else 0
    assert decay[f'backbone.stages.{stage}.downsample.reduction.weight'] == 0.05
    assert decay['backbone.patch_embed.projection.weight'] == 0.05


@pytest.mark.parametrize('name', PRETRAINING)
def test_schedule(name):
    cfg = Config.fromfile(ROOT / 'configs' / name)
    warmup, cosine = cfg.param_scheduler
    epochs = cfg.train_cfg.max_epochs
    assert epochs == (100 if name == TINY else 200)
    assert (warmup.begin, warmup.end) == (0, cosine.begin) == (0, 10 if name == TINY else 40)
    assert cosine.end == epochs == cosine.begin + cosine.T_max
    assert cfg.train_dataloader.batch_size == (128 if name == TINY else 256)
    assert cfg.default_hooks.checkpoint.max_keep_ckpts == 3
    assert cfg.randomness.seed == 0


@pytest.mark.parametrize('name', PRETRAINING)
def test_pretraining_step(name, imagenet, train_tool, tmp_path):
    """A step of the recipe itself: images from folders, loss, backward, AdamW."""
    root = imagenet if name != TINY else imagenet / 'train'
    cfg = train_tool.prepare(
        train_tool.parse_args(
            [
                str(ROOT / 'configs' / name),
                f'--work-dir={tmp_path}',
                '--cfg-options',
                f'train_dataloader.dataset.data_root={root}',
                'train_dataloader.batch_size=4',
                'train_dataloader.num_workers=0',
                'optim_wrapper.type=OptimWrapper',
                'train_cfg.max_epochs=1',
                'default_hooks.checkpoint=None',
            ]
        )[1]
    )
    if name not in (BASE, TINY):
        shrink(cfg)
    runner = train_tool.build_runner(cfg)
    runner.train()
    assert runner.iter == 1 and len(runner.train_dataloader.dataset) == 4
    loss = runner.message_hub.get_scalar('train/loss').current()
    # Units are normalised, so a guess of zeros would lose 1; SimMIM measures in L1.
    assert math.isfinite(loss) and (0.5 if name in SIMMIM else 0.9) < loss < 2
    assert not untrained(runner)


@pytest.mark.parametrize('name', SIMMIM)
def test_baseline_differs_in_the_method_alone(name):
    ours, theirs = (
        Config.fromfile(ROOT / 'configs' / one).to_dict() for one in (SIMMIM[name], name)
    )
    models = ours.pop('model'), theirs.pop('model')
    loaders = ours['train_dataloader'], theirs['train_dataloader']
    pipelines = [loader['dataset'].pop('pipeline') for loader in loaders]
    for one in (ours, theirs):
        one.pop('train_pipeline')
    assert ours == theirs
    mask = pipelines[1].pop(3)
    assert mask['type'] == 'SimMIMMaskGenerator' and pipelines[0] == pipelines[1]
    assert models[0]['data_preprocessor'] == models[1]['data_preprocessor']
    backbones = [model['backbone'] for model in models]
    assert mask['input_size'] == pipelines[0][1]['scale']
    assert {backbone['img_size'] for backbone in backbones} == {mask['input_size']}
    for key in ('arch', 'drop_path_rate'):
        assert backbones[0][key] == backbones[1][key]
    # The networks are the same: one's weights are the other's.
    init_default_scope('mmpretrain')
    for backbone in backbones:
        arch = dict(SMALL, extra_norm_every_n_blocks=0) if 'V2' in backbone['type'] else SMALL
        backbone['arch'] = arch
    green, sim = (MODELS.build(backbone) for backbone in backbones)
    sim.load_state_dict(dict(green.state_dict(), mask_token=sim.mask_token), strict=False)
    for backbone in (green, sim):
        backbone.eval()
    images = torch.randn(1, 3, mask['input_size'], mask['input_size'])
    with torch.no_grad():
        torch.testing.assert_close(green(images), sim(images, None), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', [STOCK, GREEN, GREEN_V2])
def test_detection_step_from_a_pretraining_checkpoint(name, coco, train_tool, tmp_path):
    """A step of mmdet's recipe; the backbone starts from what pre-training has saved."""
    pretraining = Config.fromfile(ROOT / 'configs' / (V2_BASE if name == GREEN_V2 else BASE))
    shrink(pretraining)
    model = build(pretraining)
    weights = model.state_dict()
    checkpoint = tmp_path / 'epoch_200.pth'
    torch.save(dict(state_dict=weights), checkpoint)

    cfg = train_tool.prepare(
        train_tool.parse_args(
            [
                str(ROOT / 'configs' / name),
                f'--work-dir={tmp_path}',
                '--cfg-options',
                f'train_dataloader.dataset.data_root={coco}/',
                f'model.backbone.init_cfg.checkpoint={checkpoint}',
                'train_dataloader.batch_size=1',
                'train_dataloader.num_workers=0',
                'optim_wrapper.type=OptimWrapper',
                'train_cfg.max_epochs=1',
                # Training alone: test_tools/test_train.py tests a detector.
                'val_cfg=None',
                'val_dataloader=None',
                'val_evaluator=None',
                'default_hooks.checkpoint=None',
            ]
        )[1]
    )
    shrink(cfg)
    pipeline = cfg.train_dataloader.dataset.pipeline
    assert [transform.type for transform in pipeline][3] == 'RandomChoice'
    pipeline[3] = dict(type='Resize', scale=(128, 128))  # instead of 400 to 800 pixels
    runner = train_tool.build_runner(cfg)
    started_from = {}
    original = runner.load_or_resume

    def look_and_go_on():
        started_from.update({k: v.clone() for k, v in runner.model.state_dict().items()})
        original()

    runner.load_or_resume = look_and_go_on
    runner.train()
    assert runner.iter == 1
    assert math.isfinite(runner.message_hub.get_scalar('train/loss').current())
    shared = {key for key, _ in model.named_parameters() if key.startswith('backbone.')}
    assert shared <= started_from.keys()
    for key in shared:
        torch.testing.assert_close(started_from[key], weights[key], rtol=0, atol=0)
    assert not [name for name in untrained(runner) if name.startswith('backbone.')]


def test_both_detectors_compute_the_same():
    """mmdet's backbone and this package's, with the same weights, also on a small map."""
    backbones = []
    for name in (STOCK, GREEN):
        cfg = Config.fromfile(ROOT / 'configs' / name)
        shrink(cfg)
        init_default_scope('mmdet')
        cfg.model.backbone.init_cfg = None
        backbones.append(MODELS.build(cfg.model.backbone).double())
    stock, green = backbones
    stock.eval()
    green.eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in stock.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).double() * 0.1
    green.load_state_dict(stock.state_dict(), strict=True)
    images = torch.randn(1, 3, 104, 136, generator=generator).double()
    with torch.no_grad():
        for one, other in zip(stock(images), green(images), strict=True):
            torch.testing.assert_close(one, other)


def test_metafiles_name_every_recipe():
    index = load(ROOT / 'model-index.yml')
    found = {}
    for path in index['Import']:
        metafile = load(ROOT / path)
        collections = {collection['Name'] for collection in metafile['Collections']}
        for collection in metafile['Collections']:
            assert (ROOT / collection['README']).is_file()
        for model in metafile['Models']:
            assert model['In Collection'] in collections
            assert (ROOT / model['Config']).stem == model['Name']
            found[model['Config'].removeprefix('configs/')] = model
    assert set(found) == set(CONFIGS)
    for name, model in found.items():
        cfg = Config.fromfile(ROOT / 'configs' / name)
        assert model['Metadata']['Epochs'] == cfg.train_cfg.max_epochs
        assert model['Metadata']['Batch Size'] == cfg.auto_scale_lr.base_batch_size
