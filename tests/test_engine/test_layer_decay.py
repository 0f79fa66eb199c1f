"""Layer-wise decay: the learning rate of every parameter, against a slow reference."""

import inspect
import re
from pathlib import Path

import pytest
from mmengine.optim import build_optim_wrapper
from torch import nn

from greenmim_mm.engine.optimizers import LayerDecayOptimWrapperConstructor
from greenmim_mm.models import GreenSwin, GreenSwinV2

RATE, LR = 0.8, 1e-3


class Detector(nn.Module):
    """As a detector has it: a backbone with all norms, and what follows."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = nn.Conv2d(4, 4, 1)
        self.bbox_head = nn.Linear(4, 2)


def backbone(version: int, depths=(2, 2, 18, 2)) -> nn.Module:
    arch = dict(embed_dims=8, depths=depths, num_heads=(1, 1, 1, 1))
    if version == 1:
        return GreenSwin(arch, out_indices=(0, 1, 2, 3))
    arch['extra_norm_every_n_blocks'] = 0
    return GreenSwinV2(arch, out_indices=(0, 1, 2, 3))


def expected_layer(name: str, version: int) -> int:
    """Layer of a parameter of Swin-B, written down block by block.

    The embedding is layer 0, blocks are 1 to 24, patch merging goes with the last block of the
    stage before it, and norms of outputs and heads are layer 25.
    """
    first_block = {0: 1, 1: 3, 2: 5, 3: 23}
    last_block = {0: 2, 1: 4, 2: 22}
    if name.startswith('backbone.patch_embed.'):
        return 0
    block = re.match(r'backbone\.stages\.(\d)\.blocks\.(\d+)\.', name)
    if block:
        return first_block[int(block[1])] + int(block[2])
    merging = re.match(r'backbone\.stages\.(\d)\.downsample\.', name)
    if merging:
        # V2 keeps it at the head of the next stage.
        return last_block[int(merging[1]) - (version == 2)]
    assert re.match(r'backbone\.norm[0-3]\.|neck\.|bbox_head\.|head\.', name), name
    return 25


def rates(model: nn.Module, **paramwise_cfg) -> dict[str, float]:
    cfg = dict(
        optimizer=dict(type='AdamW', lr=LR, weight_decay=0.05),
        constructor='greenmim_mm.LayerDecayOptimWrapperConstructor',
        paramwise_cfg=paramwise_cfg,
    )
    optimizer = build_optim_wrapper(model, cfg).optimizer
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: group['lr']
        for group in optimizer.param_groups
        for parameter in group['params']
    }


@pytest.mark.parametrize('version', [1, 2])
def test_rate_of_every_parameter_of_swin_b(version):
    model = Detector(backbone(version))
    found = rates(model, layer_decay_rate=RATE, norm_decay_mult=0.0)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, rate in found.items():
        assert rate == pytest.approx(LR * RATE ** (25 - expected_layer(name, version))), name
    assert {round(rate / LR, 12) for rate in found.values()} == {
        round(RATE**power, 12) for power in range(26)
    }


@pytest.mark.parametrize('version', [1, 2])
def test_same_as_mmpretrains_constructor_for_classifiers(version):
    from mmpretrain.models import ImageClassifier

    model = ImageClassifier(
        backbone(version, (1, 1, 2, 1)),
        head=dict(type='LinearClsHead', num_classes=3, in_channels=64),
    )
    settings = dict(layer_decay_rate=RATE, norm_decay_mult=0.0, bias_decay_mult=0.0)
    optimizers = [
        build_optim_wrapper(
            model,
            dict(
                optimizer=dict(type='AdamW', lr=LR, weight_decay=0.05),
                constructor=constructor,
                paramwise_cfg=settings,
            ),
        ).optimizer
        for constructor in (
            'greenmim_mm.LayerDecayOptimWrapperConstructor',
            'mmpretrain.LearningRateDecayOptimWrapperConstructor',
        )
    ]
    tables = [
        {
            id(parameter): (pytest.approx(group['lr']), group['weight_decay'])
            for group in optimizer.param_groups
            for parameter in group['params']
        }
        for optimizer in optimizers
    ]
    assert tables[0] == tables[1]


def test_other_settings_multiply_and_frozen_parameters_stay_out():
    model = Detector(backbone(1, (1, 1, 2, 1)))
    model.backbone.patch_embed.requires_grad_(False)
    found = rates(
        model,
        layer_decay_rate=RATE,
        custom_keys={'bbox_head': dict(lr_mult=10.0), 'stages.3': dict(lr_mult=0.5)},
    )
    assert not [name for name in found if 'patch_embed' in name]
    assert found['bbox_head.weight'] == pytest.approx(10 * LR)
    # Of seven layers the last block is the sixth.
    assert found['backbone.stages.3.blocks.0.norm1.weight'] == pytest.approx(0.5 * LR * RATE)


def test_through_the_wrapper_of_distributed_training():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = Detector(backbone(1, (1, 1, 1, 1)))
    found = [rates(one, layer_decay_rate=RATE) for one in (model, Wrapper(model).module)]
    assert found[0] == found[1]


@pytest.mark.parametrize('rate', [0, -0.5, 1.1, None, True, '0.9'])
def test_refuses_a_rate_that_makes_no_sense(rate):
    with pytest.raises(ValueError, match=r'layer_decay_rate=.* must lie in \(0, 1\]'):
        rates(Detector(backbone(1, (1, 1, 1, 1))), layer_decay_rate=rate)


def test_refuses_a_backbone_that_does_not_know_its_layers():
    with pytest.raises(TypeError, match="Linear does not say .* type='greenmim_mm.GreenSwin'"):
        rates(Detector(nn.Linear(2, 2)), layer_decay_rate=RATE)


def test_needs_mmengine_alone():
    """A detection-only user has no mmpretrain, a pre-training-only user no mmdet."""
    source = Path(inspect.getfile(LayerDecayOptimWrapperConstructor)).read_text()
    imported = re.findall(r'^\s*(?:from|import) (\w+)', source, flags=re.MULTILINE)
    assert set(imported) <= {'itertools', 'mmengine', 'torch'}


def test_one_is_the_same_rate_for_all():
    model = Detector(backbone(1, (1, 1, 1, 1)))
    assert set(rates(model, layer_decay_rate=1).values()) == {LR}
