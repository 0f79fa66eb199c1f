"""Recipes made small: the same keys, narrow networks, small images and two steps."""

from copy import deepcopy
from functools import cache
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(
    path.relative_to(ROOT / 'configs').with_suffix('').as_posix()
    for path in ROOT.glob('configs/*/*.py')
    if path.parent.name not in ('_base_', 'demo')
    # Another recipe under a strategy of sharding: test_models/test_sharding.py.
    and not path.stem.endswith(('_fsdp', '_deepspeed-zero2'))
)
WIDTH = 16
SMALL = dict(embed_dims=WIDTH, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 4))
WIDTHS = [WIDTH << stage for stage in range(4)]


def load(name: str) -> Config:
    """The recipe as it is; relative paths are those of the stand-in data, see conftest.py."""
    return deepcopy(_read(name))


@cache
def _read(name: str) -> Config:
    return Config.fromfile(ROOT / 'configs' / f'{name}.py')


def build(cfg: Config) -> nn.Module:
    init_default_scope(cfg.default_scope)
    return MODELS.build(cfg.model)


def shrink(cfg: Config) -> Config:
    """Make the network narrow; everything else stays as the recipe has it."""
    model = cfg.model
    backbone = model.backbone
    if 'V2' in backbone.type:
        backbone.arch = dict(SMALL, extra_norm_every_n_blocks=0)
    elif 'arch' in backbone:
        backbone.arch = SMALL
    else:
        backbone.update(SMALL)
    neck = model.get('neck')
    if model.type == 'greenmim_mm.GreenMIM':
        neck.update(embed_dim=WIDTHS[-1], decoder_embed_dim=32, decoder_num_heads=2)
    elif model.type == 'SimMIM':
        neck.in_channels = WIDTHS[-1]
    elif model.type == 'ImageClassifier':
        if isinstance(neck, list):
            neck[1].input_features = WIDTHS[-1]
        if model.head is not None:
            model.head.in_channels = WIDTHS[-1]
    elif model.type == 'DINO':
        neck.in_channels = WIDTHS
        model.num_queries = 20
        model.encoder.num_layers = model.decoder.num_layers = 1
    elif model.type == 'EncoderDecoder':
        model.decode_head.update(in_channels=WIDTHS, channels=32)
        model.auxiliary_head.update(in_channels=WIDTHS[2], channels=16)
    else:
        _shrink_rcnn(model)
    return cfg


def _shrink_rcnn(model: ConfigDict) -> None:
    model.neck.update(in_channels=WIDTHS, out_channels=32)
    model.rpn_head.update(in_channels=32, feat_channels=32)
    roi = model.roi_head
    heads = roi.bbox_head if isinstance(roi.bbox_head, list) else [roi.bbox_head]
    for head in heads:
        head.update(in_channels=32, fc_out_channels=32)
        if 'conv_out_channels' in head:
            head.conv_out_channels = 32
    roi.bbox_roi_extractor.out_channels = roi.mask_roi_extractor.out_channels = 32
    roi.mask_head.update(in_channels=32, conv_out_channels=32)
    model.train_cfg.rpn_proposal.max_per_img = 20
    model.test_cfg.rpn.max_per_img = 20
    # A network that has learned nothing is sure of nothing, and nothing is scored.
    model.test_cfg.rcnn.score_thr = 0.0


def short(cfg: Config, work_dir: Path) -> Config:
    """Two training steps and one validation on a CPU."""
    cfg.work_dir = str(work_dir)
    cfg.log_level = 'ERROR'
    if cfg.get('optim_wrapper'):
        assert cfg.optim_wrapper.type in ('AmpOptimWrapper', 'OptimWrapper')
        cfg.optim_wrapper.type = 'OptimWrapper'
    if cfg.get('train_cfg'):
        steps = dict(max_iters=2) if 'max_iters' in cfg.train_cfg else dict(max_epochs=1)
        cfg.train_cfg.update(steps, val_interval=2 if 'max_iters' in steps else 1)
    if cfg.default_scope != 'mmpretrain':
        _smaller_images(list(cfg.values()))
    loaders = [cfg.get(f'{name}_dataloader') for name in ('train', 'val', 'test', 'bank')]
    if 'bank_dataloader' in (cfg.get('test_cfg') or {}):
        loaders.append(cfg.test_cfg.bank_dataloader)
    for loader in filter(None, loaders):
        bank = loader is loaders[-1] and len(loaders) > 4
        loader.update(batch_size=8 if bank else 2, num_workers=0, persistent_workers=False)
        loader.dataset.indices = 24 if bank else 4 if loader is loaders[0] else 2
    cfg.default_hooks.checkpoint = None
    return cfg


def _smaller_images(node) -> None:
    """Images of 100 pixels and less where detectors have 800."""
    if isinstance(node, dict):
        if isinstance(node.get('scale'), tuple):
            node['scale'] = (128, 96)
        if 'scales' in node and node.get('type') == 'RandomChoiceResize':
            node['scales'] = [(96, 128)]
        if node.get('type') == 'SegDataPreProcessor':
            node['size'] = (64, 64)
        if node.get('type') == 'RandomCrop':
            node['crop_size'] = (64, 64)
        for value in node.values():
            _smaller_images(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            _smaller_images(value)


def run(cfg: Config) -> tuple[Runner, dict[str, torch.Tensor]]:
    """Train, or test where nothing is to be trained.

    Returns:
        The runner, and the weights from which it started.
    """
    runner = Runner.from_cfg(cfg)
    start: dict[str, torch.Tensor] = {}
    original = runner.load_or_resume

    def look_and_go_on():
        start.update({key: value.clone() for key, value in runner.model.state_dict().items()})
        original()

    runner.load_or_resume = look_and_go_on
    runner.train() if cfg.get('train_cfg') else runner.test()
    return runner, start


def untrained(runner: Runner) -> list[str]:
    """Parameters that were to be trained and got no gradient: optimisers keep no state for them."""
    state = runner.optim_wrapper.optimizer.state
    return [n for n, p in runner.model.named_parameters() if p.requires_grad and p not in state]


def start_of(cfg: Config) -> str | None:
    """The checkpoint that the recipe's backbone starts from."""
    init_cfg = cfg.model.backbone.get('init_cfg')
    return init_cfg['checkpoint'] if isinstance(init_cfg, dict) else None


@cache
def pretrained(path: str, folder: Path) -> dict[str, torch.Tensor]:
    """Write the checkpoint of this name as the (small) recipe of pre-training would leave it."""
    name = Path(path).parent.name
    (recipe,) = [one for one in RECIPES if Path(one).name == name]
    model = build(shrink(load(recipe)))
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(meta={}, state_dict=model.state_dict()), target)
    return model.state_dict()
