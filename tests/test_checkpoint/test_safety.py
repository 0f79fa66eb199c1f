"""What converting must not do to other files, and odd contents that must not pass unseen."""

import os

import numpy as np
import pytest
import torch
from tiny_swins import pretrained_file, pretrained_weights
from transformers import SwinModel, Swinv2Backbone, Swinv2Config

from greenmim_mm.checkpoint import (
    CheckpointError,
    LossError,
    convert_file,
    convert_state_dict,
    inspect_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from greenmim_mm.text import printable
from greenmim_mm.verification import verify_network


def file_of(folder, weights, name='odd.pth', **rest):
    path = folder / name
    torch.save(dict(state_dict=weights, **rest), path)
    return path


def test_source_and_destination_in_each_other(tmp_path):
    src = pretrained_file(tmp_path)
    hf = tmp_path / 'hf'
    convert_file(src, hf, 'huggingface')
    before = (hf / 'model.safetensors').read_bytes()
    with pytest.raises(FileExistsError, match='lies inside'):
        convert_file(hf / 'model.safetensors', hf, 'huggingface', force=True)
    with pytest.raises(FileExistsError, match='lies inside'):
        convert_file(hf, hf / 'model.safetensors', 'timm', force=True)
    assert (hf / 'model.safetensors').read_bytes() == before


def test_rights_follow_the_umask(tmp_path):
    convert_file(pretrained_file(tmp_path), tmp_path / 'hf', 'huggingface')
    mask = os.umask(0)
    os.umask(mask)
    for path in (tmp_path / 'hf').iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_link_that_leads_nowhere_is_kept(tmp_path):
    link = tmp_path / 'x.pth'
    link.symlink_to(tmp_path / 'none.pth')
    with pytest.raises(FileExistsError, match='--force'):
        convert_file(pretrained_file(tmp_path), link, 'mmdet')
    assert link.is_symlink()


def test_what_is_no_tensor_is_told(tmp_path):
    weights = pretrained_weights()
    src = file_of(tmp_path, {**weights, 3: torch.ones(1), 'extra': np.ones(2)})
    report = convert_file(src, tmp_path / 'x.pth', 'mmdet').report
    assert {key for key, why in report.dropped.items() if 'tensor' in why} == {'3', 'extra'}
    key = 'backbone.norm3.weight'
    src = file_of(tmp_path, {**weights, key: weights[key].numpy()})
    with pytest.raises(CheckpointError, match=key.replace('.', r'\.')):
        convert_file(src, tmp_path / 'y.pth', 'mmdet')
    key = 'backbone.stages.0.blocks.0.norm1.weight'
    src = file_of(tmp_path, {**weights, key: weights[key].numpy()})
    with pytest.raises(CheckpointError, match='numpy arrays, e.g. ' + key):
        convert_file(src, tmp_path / 'y.pth', 'mmdet')


@pytest.mark.parametrize('dtype', [torch.int8, torch.complex64])
def test_learned_parameters_are_floats(tmp_path, dtype):
    key = 'backbone.norm3.weight'
    weights = pretrained_weights()
    src = file_of(tmp_path, {**weights, key: weights[key].to(dtype)})
    with pytest.raises(CheckpointError, match=f'{key} has numbers of type'):
        convert_file(src, tmp_path / 'x.pth', 'mmdet')


def test_nan_in_a_part_that_is_dropped(tmp_path):
    weights = pretrained_weights()
    name = next(key for key in weights if key.startswith('neck.'))
    weights[name] = torch.full_like(weights[name], torch.nan)
    src = file_of(tmp_path, weights)
    convert_file(src, tmp_path / 'x.pth', 'mmdet')
    with pytest.raises(CheckpointError, match='NaN'):
        convert_file(src, tmp_path / 'y.pth', 'greenmim_mm')


def test_8_bit_floats_have_a_message_of_their_own(tmp_path):
    weights = {k: v.to(torch.float8_e4m3fn) for k, v in pretrained_weights().items() if 'norm' in k}
    try:
        path = file_of(tmp_path, weights)
    except KeyError:
        pytest.skip('torch 2.1 saves no 8-bit floats')
    with pytest.raises(CheckpointError, match='8-bit floats.*float32'):
        load_checkpoint(path)


def test_terminal_escapes(tmp_path):
    assert printable('a\x1b[2J\nb\udc80') == 'a\\x1b[2J b\\udc80'
    assert len(printable('x' * 1000)) < 250
    weights = pretrained_weights() | {'\x1b[2Jevil': torch.ones(1)}
    src = file_of(tmp_path, weights, meta=dict(licence='\x1b]0;x' * 999))
    report = convert_file(src, tmp_path / 'x.pth', 'mmdet', strict=False).report
    assert '\x1b' not in report.summary() and '\\x1b[2Jevil' in report.summary()
    summary = inspect_checkpoint(tmp_path / 'x.pth').summary()
    assert '\x1b' not in summary and max(map(len, summary.splitlines())) < 1200


def test_a_config_is_made_for_saving(tmp_path):
    state_dict = convert_state_dict(pretrained_weights(), 'auto', 'huggingface')
    save_checkpoint(state_dict, tmp_path / 'hf', 'huggingface')
    _, info = SwinModel.from_pretrained(tmp_path / 'hf', output_loading_info=True)
    assert not any(info.values())


def test_parameters_under_another_key(tmp_path):
    weights = pretrained_weights()
    averaged = {'module.' + key: value + 1 for key, value in weights.items()}
    path = tmp_path / 'ema.pth'
    torch.save(dict(model_ema=weights, epoch=3), path)
    with pytest.raises(CheckpointError, match="under .'model_ema'.; say which .*--key model_ema"):
        convert_file(path, tmp_path / 'x.pth', 'mmdet')
    convert_file(path, tmp_path / 'x.pth', 'mmdet', key='model_ema')
    with pytest.raises(CheckpointError, match="has no 'none'"):
        convert_file(path, tmp_path / 'y.pth', 'mmdet', key='none')
    src = file_of(tmp_path, weights, ema_state_dict=dict(steps=torch.tensor(5), **averaged))
    result = convert_file(src, tmp_path / 'y.pth', 'mmdet')
    assert '--key ema_state_dict' in result.report.summary()
    report = convert_file(src, tmp_path / 'z.pth', 'mmdet', key='ema_state_dict').report
    assert report.lossless and not report.unknown
    key = 'backbone.norm3.bias'
    assert torch.equal(load_checkpoint(tmp_path / 'z.pth').state_dict[key], weights[key] + 1)


def test_prefixes_of_wrappers(tmp_path):
    weights = pretrained_weights()
    for prefix in ('_orig_mod.', 'module._orig_mod.', '_orig_mod.module.'):
        src = file_of(tmp_path, {prefix + key: value for key, value in weights.items()})
        assert load_checkpoint(src).state_dict.keys() == weights.keys()


def test_backbone_of_swin_v2_in_transformers(tmp_path):
    config = Swinv2Config(
        embed_dim=8, depths=[1, 1, 1, 2], num_heads=[1] * 4, image_size=64, window_size=2,
        out_features=['stage2', 'stage4'],
    )  # fmt: skip
    Swinv2Backbone(config).save_pretrained(tmp_path / 'hf')
    convert_file(tmp_path / 'hf', tmp_path / 'copy', 'huggingface', verify=verify_network)
    model, info = Swinv2Backbone.from_pretrained(tmp_path / 'copy', output_loading_info=True)
    assert not any(info.values()) and model.out_features == ['stage2', 'stage4']


def test_position_embedding_of_transformers_is_named(tmp_path):
    state_dict = convert_state_dict(pretrained_weights(), 'auto', 'huggingface')
    state_dict['embeddings.position_embeddings'] = torch.zeros(1, 257, 8)
    torch.save(state_dict, tmp_path / 'x.pth')
    with pytest.raises(LossError, match='absolute position embedding'):
        convert_file(tmp_path / 'x.pth', tmp_path / 'y.pth', 'mmdet')


def test_huge_windows(tmp_path):
    with pytest.raises(ValueError, match='at most 64'):
        convert_file(pretrained_file(tmp_path), tmp_path / 'x.pth', 'timm', window_size=5000)
