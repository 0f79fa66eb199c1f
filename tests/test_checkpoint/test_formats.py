"""Naming of formats: against the libraries themselves, and which format a file has."""

import pytest
import timm
import torch
from mmpretrain.models.selfsup.simmim import SimMIMSwinTransformer
from swin_libraries import (
    ARCH,
    ARCH_V2,
    HUGGINGFACE,
    LIBRARIES,
    green,
    huggingface_swin,
    mmpretrain_swin,
    randomised,
    timm_swin,
)
from torch import nn
from torchvision.models import resnet18

from greenmim_mm.checkpoint import (
    FORMATS,
    convert_state_dict,
    convert_with_report,
    detect_format,
    network_of,
)
from greenmim_mm.models import GreenSwin, GreenSwinV2

MODELS = {
    **{(name, 1, ''): name for name in LIBRARIES},
    **{(name, 2, ''): name for name in LIBRARIES if name != 'mmdet'},
    **{
        ('huggingface', version, kind): 'huggingface'
        for kind, classes in HUGGINGFACE.items()
        for version in classes
    },
}


def build(name: str, version: int, kind: str) -> nn.Module:
    return randomised(huggingface_swin(version, kind) if kind else LIBRARIES[name](version))


@pytest.mark.parametrize('case', MODELS, ids=lambda case: '-'.join(map(str, case)))
def test_every_name_of_the_library_is_known(case):
    name, version, _ = case
    weights = build(*case).state_dict()
    # A bare backbone of OpenMMLab may be any of theirs; V1 is taken for mmdet's, V2 not.
    expected = 'mmdet' if name == 'mmpretrain' and version == 1 else name
    assert detect_format(list(weights)) == expected
    for source in ('auto', name):
        assert network_of(weights, source).architecture.version == version
    same, report = convert_with_report(weights, name, name)
    assert not report.dropped
    for key, value in weights.items():
        key = 'backbone.' + key if name.startswith('mm') else key
        assert torch.equal(same[key], value)


@pytest.mark.parametrize('version', [1, 2])
def test_canonical_names_are_green_swins(version):
    ours = (GreenSwin, GreenSwinV2)[version - 1]
    arch = (ARCH, ARCH_V2)[version - 1]
    expected = ours(arch, window_size=4).state_dict()
    buffers = ('relative_position_index', 'relative_coords_table')
    for name in ('timm', 'torchvision'):
        canonical = network_of(build(name, version, '').state_dict()).state_dict
        names = {key for key in canonical if not key.startswith('head.fc.')}
        kept = name == 'torchvision'
        assert names == {key for key in expected if kept or not key.endswith(buffers)}
        assert all(expected[key].shape == canonical[key].shape for key in names)


def simmim_weights(version: int) -> dict:
    """What SimMIM pre-training saves under the names of mmpretrain (V2: as they would be)."""
    if version == 1:
        backbone = SimMIMSwinTransformer(arch=ARCH).state_dict()
    else:
        backbone = green(2, out_indices=(3,)).state_dict() | {'mask_token': torch.zeros(1, 1, 8)}
    weights = {'backbone.' + key: torch.randn(value.shape) for key, value in backbone.items()}
    weights = {k: v for k, v in weights.items() if not k.endswith(('_index', 'coords_table'))}
    neck = {'weight': torch.randn(48, 64, 1, 1), 'bias': torch.randn(48)}
    return weights | {'neck.decoder.0.' + key: value for key, value in neck.items()}


@pytest.mark.parametrize('version', [1, 2])
def test_simmim(version):
    weights = simmim_weights(version)
    assert detect_format(list(weights)) == 'mmpretrain'
    microsoft = convert_state_dict(weights, 'auto', 'microsoft')
    assert {'encoder.mask_token', 'decoder.0.weight', 'encoder.norm.bias'} <= microsoft.keys()
    assert detect_format(list(microsoft)) == 'microsoft'
    # The published files of V2, and what all of them have besides.
    renamed = {k.replace('cpb_mlp', 'rpe_mlp'): value for k, value in microsoft.items()}
    mask = {'encoder.layers.0.blocks.1.attn_mask': torch.zeros(4, 16, 16)}
    again, report = convert_with_report(renamed | mask, 'auto', 'microsoft')
    assert again.keys() == microsoft.keys()
    assert report.dropped == dict.fromkeys(mask, 'computed, not learned')
    converted = convert_state_dict(renamed, 'auto', 'huggingface')
    prefix = {1: 'swin.', 2: 'swinv2.'}[version]
    assert {prefix + 'embeddings.mask_token', 'decoder.0.bias'} <= converted.keys()
    if version == 1:
        model = HUGGINGFACE['simmim'][1](huggingface_swin(1).config)
        names = {k for k in model.state_dict() if not k.endswith('position_index')}
        assert {k for k in converted if not k.endswith('position_index')} == names
    back = convert_state_dict(converted, 'auto', 'mmpretrain')
    assert all(torch.equal(back[key], value) for key, value in weights.items())
    detector, report = convert_with_report(microsoft, 'auto', 'mmdet')
    pretraining = {'encoder.mask_token', 'decoder.0.weight', 'decoder.0.bias'}
    assert {key for key, reason in report.dropped.items() if 'SimMIM' in reason} == pretraining
    assert report.lossless
    assert not any('mask_token' in key for key in detector)


def test_swin_backbone_of_transformers():
    """A norm per stage makes a SwinBackbone, a classifier keeps its own head."""
    weights = {'backbone.' + k: v for k, v in randomised(green(1)).state_dict().items()}
    model = huggingface_swin(1, 'backbone')
    converted, report = convert_with_report(weights, 'mmdet', 'huggingface')
    model.load_state_dict(converted)
    assert not report.dropped and not report.missing
    weights = {
        k: v for k, v in weights.items() if k.split('.')[1] not in ('norm0', 'norm1', 'norm2')
    }
    huggingface_swin(1).load_state_dict(convert_state_dict(weights, 'mmdet', 'huggingface'))
    head = {'head.fc.weight': torch.rand(5, 64), 'head.fc.bias': torch.rand(5)}
    converted = convert_state_dict(weights | head, 'mmpretrain', 'huggingface')
    huggingface_swin(1, 'classifier').load_state_dict(converted)


@pytest.mark.parametrize('prefix', ['backbone.bottom_up.', 'backbone.net.', 'backbone.', ''])
def test_prefixes_of_detectron2(prefix):
    weights = {'backbone.' + k: v for k, v in randomised(green(1)).state_dict().items()}
    converted = convert_state_dict(weights, 'mmdet', 'detectron2')
    assert 'backbone.bottom_up.layers.0.downsample.reduction.weight' in converted
    assert 'backbone.bottom_up.norm0.weight' in converted
    moved = {prefix + key.removeprefix('backbone.bottom_up.'): v for key, v in converted.items()}
    moved['roi_heads.box_head.fc1.weight'] = torch.zeros(1)
    if prefix:
        assert detect_format(list(moved)) == 'detectron2'
    back, report = convert_with_report(moved, 'detectron2', 'mmdet')
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], value) for key, value in weights.items())
    reason = report.dropped['roi_heads.box_head.fc1.weight']
    assert reason == ('beside the backbone (roi_heads)' if prefix else 'unknown name')
    assert report.lossless == bool(prefix)


def test_whole_detector():
    backbone = {'backbone.' + k: v for k, v in randomised(green(1)).state_dict().items()}
    # More keys than the backbone has.
    rest = {
        f'{part}.layers.{i}.norm.weight': torch.zeros(1)
        for part in ('neck', 'encoder')
        for i in range(99)
    }
    assert detect_format([*backbone, *rest]) == 'mmdet'
    converted, report = convert_with_report({**rest, **backbone}, 'auto', 'greenmim_mm')
    assert converted.keys() == backbone.keys()
    assert report.lossless
    assert set(report.dropped.values()) == {
        'beside the backbone (neck)',
        'beside the backbone (encoder)',
    }


@pytest.mark.parametrize('version', [1, 2])
def test_classifiers_of_openmmlab(version):
    keys = ['backbone.' + key for key in mmpretrain_swin(version).state_dict()]
    assert detect_format([*keys, 'head.fc.weight', 'head.fc.bias']) == 'mmpretrain'


def test_formats_mixed():
    weights = {'backbone.' + key: value for key, value in green(1).state_dict().items()}
    for other in ('timm', 'microsoft', 'huggingface', 'torchvision', 'greenmim'):
        keys = list(convert_state_dict(weights, 'mmdet', other))
        # Half a Swin of each; blocks are the last thing that a stage has before its merging.
        mixed = [*list(weights)[: len(weights) // 2], *keys[len(keys) // 2 :]]
        with pytest.raises(
            ValueError, match=rf'two formats are mixed: .*(mmdet.*{other}|{other}.*mmdet)'
        ):
            detect_format(mixed)
        # And whole ones, and almost nothing of the second.
        for mixed in (
            [*weights, *keys],
            [*weights, next(k for k in keys if 'blocks.0' in k or '.1.0' in k)],
        ):
            with pytest.raises(ValueError, match='two formats are mixed: .*mmdet'):
                detect_format(mixed)


@pytest.mark.parametrize('prefix', ['', 'backbone.', 'encoder.'])
@pytest.mark.parametrize('name', ['resnet18', 'vit_tiny_patch16_224', 'convnext_atto'])
def test_other_networks(name, prefix):
    model = resnet18() if name == 'resnet18' else timm.create_model(name)
    weights = {prefix + key: value for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match='no known Swin format: .*mmdet knows'):
        detect_format(list(weights))
    for source in FORMATS:
        with pytest.raises(ValueError, match='no whole Swin|another architecture'):
            convert_state_dict(weights, source, 'mmdet')


def test_detection_needs_half_of_the_keys():
    backbone = ['backbone.' + key for key in green(1).state_dict()]
    half = [f'backbone.unknown.{index}' for index in range(len(backbone))]
    assert detect_format(backbone + half[1:]) == 'mmdet'
    for keys in (backbone + half, half, []):
        known = len(backbone) if keys[: len(backbone)] == backbone else 0
        with pytest.raises(ValueError, match=rf'mmdet knows {known} of {len(keys)} keys'):
            detect_format(keys)


@pytest.mark.parametrize('target', ['greenmim', 'detectron2'])
def test_formats_without_v2(target):
    weights = timm_swin(2).state_dict()
    with pytest.raises(ValueError, match=f'Swin V2 cannot become {target}: .*has no|have|none'):
        convert_state_dict(weights, 'timm', target)


def test_names_are_unique():
    for entry in FORMATS.values():
        for layout in entry.layouts:
            values = {'s': 1, 'd': 1, 'b': 7, 'p': 'weight'}
            names = [own.fill(values) for own, _ in layout._pairs]
            assert len(set(names)) == len(names)
            here = [layout.from_canonical(name) for name in names]
            assert len(set(here)) == len(here)
            assert [layout.to_canonical(name) for name in here] == names
