"""Weights into networks, ours and stock mmdet, whole or not at all."""

import pytest
import torch
from mmdet.models.backbones.swin import SwinTransformer as MMDetSwin
from mmengine.config import ConfigDict
from runner_files import assert_same, snapshot, tiny_model, tiny_swin
from torchvision.models import resnet18

from greenmim_mm.checkpoint import CheckpointError, load_backbone_state_dict, load_model_state_dict
from greenmim_mm.ops import resize_bias_table


def test_load_backbone_of_runner_checkpoint(runner_file):
    backbone = tiny_swin(out_indices=(0, 1, 2, 3))
    before = snapshot(backbone)
    report = load_backbone_state_dict(backbone, runner_file)
    absent = {f'norm{stage}.{p}' for stage in range(3) for p in ('weight', 'bias')}
    state_dict = torch.load(runner_file, weights_only=False)['state_dict']
    for key, value in backbone.state_dict().items():
        expected = before[key] if key in absent else state_dict['backbone.' + key]
        assert torch.equal(value, expected), key
    assert all(key in report for key in absent)
    assert f'{len(before) - 6} of {len(before)}' in report


@pytest.mark.parametrize('prefix', [None, 'model.backbone', 'model.backbone.'])
def test_load_backbone_prefix(tmp_path, prefix):
    source, target = tiny_swin(), tiny_swin()
    added = '' if prefix is None else 'model.backbone.'
    path = tmp_path / 'x.pth'
    torch.save({added + key: value for key, value in source.state_dict().items()}, path)
    load_backbone_state_dict(target, path, prefix)
    assert_same(target, source.state_dict())


def test_init_cfg_pretrained(runner_file):
    backbone = tiny_swin(init_cfg=dict(type='Pretrained', checkpoint=str(runner_file)))
    backbone.init_weights()
    state_dict = torch.load(runner_file, weights_only=False)['state_dict']
    assert_same(
        backbone,
        {key.removeprefix('backbone.'): value for key, value in state_dict.items()},
    )


def spoiled_weights(kind: str) -> dict:
    weights = tiny_swin().state_dict()
    if kind == 'resnet':
        return resnet18().state_dict()
    if kind == 'missing':
        del weights['stages.3.blocks.0.norm1.weight']
    elif kind == 'shape':
        weights['stages.3.blocks.0.norm1.weight'] = torch.zeros(3)
    elif kind == 'heads':
        weights['stages.3.blocks.0.attn.w_msa.relative_position_bias_table'] = torch.zeros(9, 5)
    elif kind == 'rows':
        weights['stages.3.blocks.0.attn.w_msa.relative_position_bias_table'] = torch.zeros(8, 4)
    return {'backbone.' + key: value for key, value in weights.items()}


@pytest.mark.parametrize(
    'kind, num_lost, message',
    [
        ('resnet', None, 'are missing'),
        ('missing', 1, r'1 are missing.*stages\.3\.blocks\.0\.norm1\.weight'),
        ('shape', 1, r'norm1\.weight: \(3,\) in the file, \(64,\) here'),
        ('heads', 1, r'\(9, 5\) in the file, \(9, 4\) here'),
        ('rows', 1, r'\(8, 4\) in the file, \(9, 4\) here'),
    ],
)
def test_load_backbone_is_all_or_nothing(tmp_path, kind, num_lost, message):
    path = tmp_path / 'x.pth'
    torch.save({'state_dict': spoiled_weights(kind)}, path)
    for use in ('function', 'init_cfg'):
        backbone = tiny_swin(init_cfg=dict(type='Pretrained', checkpoint=str(path)))
        before = snapshot(backbone)
        matched = 0 if num_lost is None else len(before) - num_lost
        with pytest.raises(CheckpointError, match=message) as error:
            if use == 'function':
                load_backbone_state_dict(backbone, path)
            else:
                backbone.init_weights()
        assert f'{matched} of {len(before)} keys match' in str(error.value)
        assert str(path) in str(error.value)
        assert_same(backbone, before)


def test_window_12_loads_window_7(tmp_path):
    source = tiny_swin(window_size=7)
    source.init_weights()
    target = tiny_swin(window_size=12)
    own_index = target.stages[0].blocks[0].attn.w_msa.relative_position_index.clone()
    path = tmp_path / 'x.pth'
    torch.save({'state_dict': source.state_dict()}, path)
    load_backbone_state_dict(target, path)
    for name, value in target.state_dict().items():
        expected = source.state_dict()[name]
        if name.endswith('bias_table'):
            expected = resize_bias_table(expected, 23**2)
            assert expected.abs().max() > 0
        elif name.endswith('position_index'):
            expected = own_index
        assert torch.equal(value, expected), name
    assert target(torch.rand(1, 3, 64, 64))[0].isfinite().all()


def test_other_windows_are_told(tmp_path):
    path = tmp_path / 'x.pth'
    torch.save({'state_dict': tiny_swin(window_size=7).state_dict()}, path)
    assert 'tables' not in load_backbone_state_dict(tiny_swin(window_size=7), path)
    target = tiny_swin(window_size=(12, 12, 12, 7))
    report = load_backbone_state_dict(target, path)
    assert 'bias tables resized: 4 from window 7 to 12' in report


def test_the_remedy_names_the_converter(tmp_path):
    """An installed package has no tools/."""
    torch.save({'state_dict': spoiled_weights('missing')}, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match='greenmim convert'):
        load_backbone_state_dict(tiny_swin(), tmp_path / 'x.pth')


def load_into_mmdet(monkeypatch, path, **changes):
    """Stock mmdet by its own init_cfg, and the keys that did not fit."""
    arguments = dict(
        embed_dims=8,
        depths=(1, 1, 2, 1),
        num_heads=(1, 2, 2, 4),
        window_size=2,
        init_cfg=ConfigDict(type='Pretrained', checkpoint=str(path)),
    )
    swin = MMDetSwin(**{**arguments, **changes})
    results = []
    load = swin.load_state_dict
    monkeypatch.setattr(
        swin, 'load_state_dict', lambda *args, **kwargs: results.append(load(*args, **kwargs))
    )
    swin.init_weights()
    return swin, results[0]


def test_unconverted_checkpoint_in_mmdet(monkeypatch, runner_file):
    swin, keys = load_into_mmdet(monkeypatch, runner_file)
    assert keys.unexpected_keys == []
    assert set(keys.missing_keys) == {
        f'norm{stage}.{p}' for stage in range(3) for p in ('weight', 'bias')
    }
    state_dict = torch.load(runner_file, weights_only=False)['state_dict']
    table = 'stages.2.blocks.1.attn.w_msa.relative_position_bias_table'
    assert torch.equal(swin.state_dict()[table], state_dict['backbone.' + table])


def test_resize_bias_table_is_mmdets(monkeypatch, tmp_path):
    source = tiny_swin(window_size=7)
    source.init_weights()
    path = tmp_path / 'x.pth'
    weights = {
        'backbone.' + key: value
        for key, value in source.state_dict().items()
        if not key.endswith('position_index')  # mmdet does not resize it.
    }
    torch.save({'state_dict': weights}, path)
    swin, _ = load_into_mmdet(monkeypatch, path, window_size=12)
    tables = {k: v for k, v in swin.state_dict().items() if k.endswith('bias_table')}
    assert len(tables) == 5
    for name, table in tables.items():
        assert table.abs().max() > 0
        assert torch.equal(resize_bias_table(source.state_dict()[name], 23**2), table)


def test_load_model(runner_file):
    model = tiny_model()
    load_model_state_dict(model, runner_file)
    assert_same(model, torch.load(runner_file, weights_only=False)['state_dict'])


@pytest.mark.parametrize(
    'change, num_lost, message',
    [
        ({'neck.decoder_pred.bias': None}, 1, r'1 are missing.*decoder_pred\.bias'),
        ({'neck.extra': torch.zeros(1)}, 0, r'1 are not of this network.*extra'),
        ({'neck.mask_token': torch.zeros(2)}, 1, r'\(2,\) in the file, \(1, 1, 16\) here'),
    ],
)
def test_load_model_is_strict(tmp_path, change, num_lost, message):
    model = tiny_model()
    before = snapshot(model)
    weights = {key: value + 1 for key, value in before.items()} | change
    path = tmp_path / 'x.pth'
    torch.save({key: value for key, value in weights.items() if value is not None}, path)
    match = rf'{len(before) - num_lost} of {len(before)} keys match.*{message}'
    with pytest.raises(CheckpointError, match=match):
        load_model_state_dict(model, path)
    assert_same(model, before)
