"""Windows, and those of pre-training, of a Swin V2 whose parameters do not tell them."""

import json

import pytest
import torch
from tiny_swins import green_swin, pretrained_file, pretrained_weights
from transformers import Swinv2Model

from greenmim_mm.checkpoint import (
    CheckpointError,
    LossError,
    convert_file,
    convert_state_dict,
    load_checkpoint,
)
from greenmim_mm.verification import VerificationError, verify, verify_network

# In use windows of 4, in pre-training of 2.
CHANGED = dict(window_size=4, pretrained_window_sizes=(2, 2, 2, 2))


@pytest.fixture
def src(tmp_path):
    return pretrained_file(tmp_path, version=2, **CHANGED)


@pytest.fixture
def untold(tmp_path):
    """As timm writes it: neither buffers nor a note."""
    path = tmp_path / 'untold.pth'
    torch.save(convert_state_dict(pretrained_weights(2, **CHANGED), 'auto', 'timm'), path)
    return path


def coords(path, stage=0):
    return load_checkpoint(path).state_dict[
        f'backbone.stages.{stage}.blocks.0.attn.w_msa.relative_coords_table'
    ]


@pytest.mark.parametrize('middle', ['t.pth', 't.safetensors'])
def test_a_chain_through_timm_loses_nothing(tmp_path, src, middle):
    result = convert_file(src, tmp_path / middle, 'timm', verify=verify_network)
    assert result.meta['window_sizes'] == '4,4,4,4'
    assert result.meta['pretrained_window_sizes'] == '2,2,2,2'
    # On through timm's own names once more.
    convert_file(tmp_path / middle, tmp_path / 'again.safetensors', 'timm')
    found = convert_file(tmp_path / 'again.safetensors', tmp_path / 'x.pth', 'mmpretrain')
    assert found.architecture.pretrained_window_sizes == (2, 2, 2, 2)
    assert torch.equal(coords(tmp_path / 'x.pth'), coords(src))
    # To other windows the scale stays that of pre-training.
    convert_file(
        tmp_path / middle, tmp_path / 'y.pth', 'mmpretrain', window_size=3, verify=verify_network
    )
    expected = green_swin(2, window_size=3, pretrained_window_sizes=(2, 2, 2, 2)).state_dict()
    key = 'stages.0.blocks.0.attn.w_msa.relative_coords_table'
    assert torch.equal(coords(tmp_path / 'y.pth'), expected[key])


def test_what_nobody_tells_is_not_guessed(tmp_path, untold):
    for options in (dict(), dict(window_size=4), dict(pretrained_window_size=None)):
        with pytest.raises(LossError, match='--window-size N and --pretrained-window-size N'):
            convert_file(untold, tmp_path / 'x.pth', 'mmpretrain', **options)
    for options in (dict(window_size=4), dict(verify=verify_network)):
        with pytest.raises(LossError, match='--pretrained-window-size'):
            convert_file(untold, tmp_path / 'x.pth', 'timm', **options)
    with pytest.raises(LossError, match='--pretrained-window-size'):
        convert_file(untold, tmp_path / 'hf', 'huggingface', window_size=4)
    with pytest.raises(ValueError, match='does not tell the windows'):
        verify(untold, untold)
    # timm's files hold nothing that depends on windows.
    result = convert_file(untold, tmp_path / 'same.pth', 'timm')
    assert 'note: the source does not tell the windows' in result.report.summary()
    assert 'window_sizes' not in result.meta


def test_given_windows(tmp_path, src, untold):
    windows = dict(window_size=4, pretrained_window_size=2)
    result = convert_file(
        untold, tmp_path / 'x.pth', 'mmpretrain', verify=verify_network, **windows
    )
    assert result.architecture.pretrained_window_sizes == (2, 2, 2, 2) and not result.report.notes
    assert torch.equal(coords(tmp_path / 'x.pth'), coords(src))
    convert_file(untold, tmp_path / 'hf', 'huggingface', verify=verify_network, **windows)
    config = json.loads((tmp_path / 'hf' / 'config.json').read_text())
    assert config['pretrained_window_sizes'] == [2, 2, 2, 2] and config['window_size'] == 4
    # What the file tells stands.
    with pytest.raises(CheckpointError, match=r'pre-trained with windows \(2, 2, 2, 2\)'):
        convert_file(src, tmp_path / 'y.pth', 'mmdet', pretrained_window_size=4)
    with pytest.raises(CheckpointError, match='is for Swin V2'):
        convert_file(
            pretrained_file(tmp_path, 'v1.pth'), tmp_path / 'y.pth', 'mmdet',
            pretrained_window_size=4,
        )  # fmt: skip


def test_an_assumption_is_told_and_is_no_note(tmp_path, untold):
    options = dict(window_size=4, strict=False)
    result = convert_file(untold, tmp_path / 'x.pth', 'timm', **options)
    assert 'taken to be those in use, (4, 4, 4, 4)' in result.report.summary()
    assert result.meta['window_sizes'] == '4,4,4,4'
    assert 'pretrained_window_sizes' not in result.meta
    with pytest.raises(LossError, match='--pretrained-window-size'):
        convert_file(tmp_path / 'x.pth', tmp_path / 'y.pth', 'mmdet')
    convert_file(tmp_path / 'x.pth', tmp_path / 'y.pth', 'mmdet', pretrained_window_size=2)


def test_a_note_that_makes_no_sense_tells_nothing(tmp_path, untold):
    for text in ('4', 'x,4,4,4', '0,4,4,4', '4,4,4,99', '9' * 200, 7):
        meta = dict(window_sizes=text, pretrained_window_sizes=text)
        torch.save(dict(meta=meta, state_dict=torch.load(untold)), tmp_path / 'n.pth')
        with pytest.raises(LossError, match='does not tell'):
            convert_file(tmp_path / 'n.pth', tmp_path / 'x.pth', 'mmdet')


def test_verify_sees_another_scale(tmp_path, src):
    other = pretrained_file(tmp_path, 'other.pth', version=2, window_size=4)
    with pytest.raises(VerificationError, match='pre-trained with windows'):
        verify(src, other)
    assert verify(src, src).passed


def test_offsets_are_not_rounded(tmp_path, src):
    for dtype in ('fp16', 'bf16'):
        dst = tmp_path / f'{dtype}.pth'
        convert_file(src, dst, 'greenmim_mm', dtype=dtype, verify=verify_network)
        assert torch.equal(coords(dst), coords(src))
    # Those that others have rounded are made anew.
    weights = {
        key: value.bfloat16() if value.is_floating_point() else value
        for key, value in pretrained_weights(2, **CHANGED).items()
    }
    torch.save(dict(state_dict=weights), tmp_path / 'rounded.pth')
    convert_file(tmp_path / 'rounded.pth', tmp_path / 'x.pth', 'mmpretrain', verify=verify_network)
    assert torch.equal(coords(tmp_path / 'x.pth'), coords(src))


@pytest.fixture
def folder(tmp_path):
    """A folder of transformers, and what changes its settings."""
    convert_file(pretrained_file(tmp_path), tmp_path / 'hf', 'huggingface')

    def change(**settings):
        path = tmp_path / 'hf' / 'config.json'
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return tmp_path / 'hf'

    return change


@pytest.mark.parametrize(
    'name, value',
    [
        ('hidden_act', 'relu'),
        ('layer_norm_eps', 1e-3),
        ('layer_norm_eps', 'x'),
        ('qkv_bias', False),
        ('use_absolute_embeddings', True),
    ],
)
def test_settings_that_change_the_network(tmp_path, folder, name, value):
    hf = folder(**{name: value})
    with pytest.raises(CheckpointError, match=f'config.json has {name}'):
        convert_file(hf, tmp_path / 'x.pth', 'timm')
    with pytest.raises(CheckpointError, match=f'config.json has {name}'):
        verify(hf, hf)
    convert_file(hf, tmp_path / 'copy', 'huggingface')
    assert json.loads((tmp_path / 'copy' / 'config.json').read_text())[name] == value


def test_other_windows_leave_the_other_settings(tmp_path, folder):
    labels = {str(index): f'road {index}' for index in range(3)}
    hf = folder(hidden_act='relu', drop_path_rate=0.3, id2label=labels, dtype='float32')
    convert_file(hf, tmp_path / 'copy', 'huggingface', window_size=4, dtype='fp16')
    config = json.loads((tmp_path / 'copy' / 'config.json').read_text())
    assert (config['hidden_act'], config['drop_path_rate']) == ('relu', 0.3)
    assert config['id2label'] == labels and config['torch_dtype'] == 'float16'
    assert (config['window_size'], config['image_size']) == (4, 128) and 'dtype' not in config


def test_a_zero_stands_for_the_window_in_use(tmp_path, src):
    hf = tmp_path / 'hf'
    convert_file(src, hf, 'huggingface')
    config = json.loads((hf / 'config.json').read_text())
    (hf / 'config.json').write_text(json.dumps(config | {'pretrained_window_sizes': [2, 2, 2, 0]}))
    result = convert_file(hf, tmp_path / 'x.pth', 'mmpretrain', verify=verify_network)
    assert result.architecture.pretrained_window_sizes == (2, 2, 2, 4)
    Swinv2Model.from_pretrained(hf)
