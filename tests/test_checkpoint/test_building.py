"""The lines of Python that build the model of a file: they do, with the parameters in it."""

import pytest
import safetensors.torch
import timm
import torch
import torchvision
import transformers
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.config import ConfigDict
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
from swin_libraries import LIBRARIES, green, randomised
from tiny_swins import green_swin, pretrained_file

from greenmim_mm.archs import SWIN_ARCHS, SWINV2_ARCHS
from greenmim_mm.checkpoint import (
    Architecture,
    build_call,
    convert_file,
    inspect_checkpoint,
    load_checkpoint,
)
from greenmim_mm.checkpoint.building import _TIMM
from greenmim_mm.registry import MODELS

REGISTRIES = dict(mmdet=MMDET_MODELS, mmpretrain=MMPRETRAIN_MODELS, greenmim_mm=MODELS)


def run(line):
    """The model that a line builds."""
    names = dict(
        timm=timm, torch=torch, torchvision=torchvision, transformers=transformers,
        safetensors=safetensors,
    )  # fmt: skip
    if line.startswith('model = '):
        exec(line, names)
        return names['model']
    model = eval(line, names)
    if isinstance(model, dict):
        model = REGISTRIES[model['type'].split('.')[0]].build(ConfigDict(model))
        model.init_weights()
    return model


def assert_has_parameters(model, path):
    expected = load_checkpoint(path).state_dict
    found = model.state_dict()
    prefix = 'backbone.' if all(key.startswith('backbone.') for key in expected) else ''
    common = {key.removeprefix(prefix) for key in expected} & found.keys()
    assert len(common) >= len(list(model.parameters())) - 6  # a detector's inner norms
    for key in common:
        torch.testing.assert_close(found[key], expected[prefix + key], rtol=0, atol=1e-6)


CASES = [
    (target, version)
    for target in ('greenmim_mm', 'mmdet', 'mmpretrain', 'timm', 'huggingface', 'torchvision')
    for version in (1, 2)
]
CHANGES = [
    {},
    dict(window_size=(4, 4, 4, 2)),
    dict(mlp_ratio=2.0, qkv_bias=False, in_channels=1),
]


@pytest.mark.parametrize('changes', CHANGES, ids=('stock', 'windows', 'sizes'))
@pytest.mark.parametrize(('target', 'version'), CASES)
def test_lines_build_the_model(tmp_path, target, version, changes):
    src = pretrained_file(tmp_path, version=version, **changes)
    # The decoder of pre-training is not the concern of these lines.
    backbone = tmp_path / 'backbone.pth'
    convert_file(src, backbone, 'mmpretrain')
    dst = tmp_path / ('hf' if target == 'huggingface' else 'x.pth')
    if target == 'huggingface' and version == 1 and 'window_size' in changes:
        with pytest.raises(ValueError, match='one window size.*--window-size'):
            convert_file(backbone, dst, target)
        return
    result = convert_file(backbone, dst, target)
    none = {
        ('mmdet', 1): 'window_size',
        ('torchvision', 1): 'window_size',
        ('torchvision', 2): 'window_size',
    }.get((target, version))
    unbuildable = (target, version) == ('mmpretrain', 2) or target == 'torchvision'
    if none in changes or (unbuildable and 'qkv_bias' in changes):
        assert result.usage.startswith('(') and result.usage.endswith(')')
        return
    assert_has_parameters(run(result.usage), dst)
    assert inspect_checkpoint(dst, target).usage == result.usage
    assert result.usage in inspect_checkpoint(dst, target).summary()


@pytest.mark.parametrize('version', [1, 2])
@pytest.mark.parametrize('name', ['timm', 'torchvision', 'huggingface'])
def test_classifiers(tmp_path, name, version):
    torch.save(randomised(LIBRARIES['timm'](version)).state_dict(), tmp_path / 'src.pth')
    dst = tmp_path / ('hf' if name == 'huggingface' else 'x.pth')
    windows = dict(window_size=4, pretrained_window_size=4) if version == 2 else {}
    model = run(convert_file(tmp_path / 'src.pth', dst, name, **windows).usage)
    assert model.state_dict().keys() & {'head.weight', 'head.fc.weight', 'classifier.weight'}
    assert_has_parameters(model, dst)


def test_windows_of_pretraining_are_told(tmp_path):
    weights = green(2, window_size=4, pretrained_window_sizes=(2, 2, 2, 2)).state_dict()
    torch.save({'backbone.' + key: value for key, value in weights.items()}, tmp_path / 'src.pth')
    for target in ('greenmim_mm', 'mmpretrain', 'timm', 'microsoft'):
        line = convert_file(tmp_path / 'src.pth', tmp_path / f'{target}.pth', target).usage
        assert 'pretrained_window_sizes=' in line
        if target != 'microsoft':
            run(line)


def architecture(name: str, version: int, windows, scale=None) -> Architecture:
    arch = dict((SWIN_ARCHS if version == 1 else SWINV2_ARCHS)[name])
    every = arch.pop('extra_norm_every_n_blocks', 0)
    return Architecture(
        version, window_sizes=windows, extra_norm_every=every, pretrained_window_sizes=scale, **arch
    )


STOCK = [
    (version, name, own)
    for version, names in _TIMM.items()
    for name, windows in names.items()
    for own in windows
]


@pytest.mark.parametrize('case', STOCK, ids=lambda case: f'{case[1]}-{case[2]}')
def test_stock_sizes_of_timm(case):
    """A name of timm's stands for the same network as all arguments spelled out."""
    version, name, own = case
    window, side = (part.split('to') for part in own.removeprefix('window').split('_'))
    sizes, scale = (
        tuple(min(int(number), int(pixels) // 4 >> stage) for stage in range(4))
        for number, pixels in ((window[-1], side[-1]), (window[0], side[0]))
    )
    found = architecture(name, version, sizes, scale if version == 2 else None)
    assert found.name == name
    short, full = build_call(found, 'timm'), build_call(found, 'timm', image_size=int(side[-1]))
    assert short.arguments == dict(num_classes=0) and own in short.first
    with torch.device('meta'):
        models = [timm.create_model(call.first, **call.arguments) for call in (short, full)]
    shapes = [
        {key: value.shape for key, value in (*model.named_parameters(), *model.named_buffers())}
        for model in models
    ]
    assert shapes[0] == shapes[1]


def test_stock_sizes_of_the_others():
    base = architecture('base', 1, (7,) * 4)
    assert str(build_call(base, 'torchvision')) == 'torchvision.models.swin_b()'
    assert str(build_call(base, 'greenmim_mm')) == (
        "dict(type='greenmim_mm.GreenSwin', arch='base', window_size=7)"
    )
    assert str(build_call(base, 'mmpretrain')) == (
        "dict(type='mmpretrain.SwinTransformer', arch='base', img_size=224)"
    )
    small = architecture('small', 2, (8,) * 4, (8,) * 4)
    assert str(build_call(small, 'torchvision')) == 'torchvision.models.swin_v2_s()'
    line = str(build_call(base, 'detectron2'))
    assert line.startswith(
        'detectron2.modeling.SwinTransformer(embed_dim=128, depths=(2, 2, 18, 2)'
    )
    assert str(build_call(base, 'microsoft')).startswith('SwinTransformer(img_size=224, embed_dim')


def test_no_line_without_windows(tmp_path):
    weights = dict(green_swin(2).named_parameters())
    torch.save({'backbone.' + key: value for key, value in weights.items()}, tmp_path / 'x.pth')
    assert 'windows are not told' in inspect_checkpoint(tmp_path / 'x.pth').usage
