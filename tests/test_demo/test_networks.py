"""The configs of the demo: a step of pre-training, then a detector that starts from it."""

import hashlib

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.structures import DataSample

from greenmim_mm.cli import runs
from greenmim_mm.cli.train import make_parser
from greenmim_mm.demo.data import DemoDataConfig, build_demo_data, draw_scene
from greenmim_mm.demo.road import NETWORKS, ROOT
from greenmim_mm.demo.scenes import PHOTOGRAPHS, load_digit_pools, load_photographs
from greenmim_mm.ops import random_mask

COCO_V2 = 'configs/mask_rcnn/mask-rcnn_greenmim-swinv2-base-w8_fpn_amp-ms-crop-3x_coco.py'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('demo') / 'data'
    build_demo_data(folder, DemoDataConfig(128, num_unlabelled=2, num_train=2, num_val=1))
    return folder


@pytest.mark.parametrize('model', NETWORKS)
def test_pretraining_and_detection(model, data, tmp_path):
    network = NETWORKS[model]
    common = ['train_dataloader.num_workers=0', 'train_cfg.max_epochs=1']

    def train(config, name, *options):
        arguments = [str(ROOT / config), f'--work-dir={tmp_path / name}', '--cfg-options']
        args = make_parser().parse_args([*arguments, *common, *options])
        runner = runs.build_runner(runs.training_config(args))
        runner.train()
        assert runner.iter == 1
        assert np.isfinite(runner.message_hub.get_scalar('train/loss').current())
        return runner

    first = train(
        network.pretrain, 'pretrain', f'train_dataloader.dataset.data_root={data}/unlabelled'
    )
    exempt = dict(swin='relative_position_bias_table', swinv2='cpb_mlp')[model]
    decays = decay_of(first)
    assert not any(decay for name, decay in decays.items() if exempt in name)
    assert not any(decay for name, decay in decays.items() if 'logit_scale' in name)
    assert decays['backbone.stages.0.blocks.0.attn.w_msa.qkv.weight'] == 0.05

    runner = train(
        network.detect,
        'detect',
        f'data_root={data}/coco/',
        f'train_dataloader.dataset.data_root={data}/coco/',
        'train_dataloader.batch_size=2',
        'model.backbone.init_cfg.type=Pretrained',
        f'model.backbone.init_cfg.checkpoint={tmp_path}/pretrain/epoch_1.pth',
        'optim_wrapper.optimizer.lr=0.0',
    )
    decays = decay_of(runner)
    assert not any(decay for name, decay in decays.items() if exempt in name)
    # The learning rate was zero: the weights are still those of the pre-training.
    found = dict(runner.model.backbone.named_parameters())
    for name, parameter in first.model.backbone.named_parameters():
        assert torch.equal(found[name], parameter), name


def test_carried_weights_paint():
    """The file that the demo starts from: whole, of the demo's model, and better than the mean."""
    (network,) = [network for network in NETWORKS.values() if network.checkpoint]
    path = ROOT / network.checkpoint
    assert path.stat().st_size < 10e6
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest in (ROOT / 'docs/evidence.md').read_text()
    cfg = Config.fromfile(ROOT / network.pretrain)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    model.load_state_dict(torch.load(path, weights_only=True)['state_dict'])
    pools, photographs = load_digit_pools(), {'dev': load_photographs(PHOTOGRAPHS['dev'])}
    config = DemoDataConfig(128)
    scenes = [draw_scene(config, 'dev', i, pools, photographs)[1] for i in range(16)]
    images = torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2).flip(1)
    samples = [DataSample() for _ in images]
    images = model.data_preprocessor(dict(inputs=images, data_samples=samples), False)['inputs']
    mask = random_mask(16, 0.5, np.random.default_rng(0))
    with torch.no_grad():
        loss = float(model.eval().masked_loss(images, mask))
    hidden = images.unfold(2, 32, 32).unfold(3, 32, 32).flatten(2, 3)[:, :, torch.from_numpy(mask)]
    of_units = float((hidden - hidden.mean((3, 4), keepdim=True)).square().mean())
    # Each unit's own mean, which no network can know, as a flat square.
    assert loss < 0.8 * of_units


def decay_of(runner) -> dict[str, float]:
    groups = runner.optim_wrapper.optimizer.param_groups
    names = {parameter: name for name, parameter in runner.model.named_parameters()}
    return {names[p]: group['weight_decay'] for group in groups for p in group['params']}


def test_coco_recipe_of_v2_learns_and_predicts():
    """The recipe itself but for its width: windows of 16 tokens, larger than most maps here."""
    from mmdet.testing import demo_mm_inputs

    cfg = Config.fromfile(ROOT / COCO_V2)
    assert cfg.model.backbone.window_size == 16
    assert cfg.model.backbone.pretrained_window_sizes == (8, 8, 8, 8)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.update(
        arch=dict(
            embed_dims=16,
            depths=(1, 1, 2, 1),
            num_heads=(1, 2, 4, 8),
            extra_norm_every_n_blocks=0,
        ),
        init_cfg=None,
    )
    cfg.model.neck.in_channels = [16, 32, 64, 128]
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    inputs = demo_mm_inputs(1, [[3, 96, 120]], num_classes=80, with_mask=True)
    data = model.data_preprocessor(inputs, True)
    losses, _ = model.parse_losses(model(**data, mode='loss'))
    losses.backward()
    assert losses.isfinite()
    for name, parameter in model.backbone.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    model.eval()
    with torch.no_grad():
        found = model(**model.data_preprocessor(inputs, False), mode='predict')
    assert len(found) == 1
    instances = found[0].pred_instances
    assert len(instances.bboxes) == len(instances.scores) == len(instances.masks)
