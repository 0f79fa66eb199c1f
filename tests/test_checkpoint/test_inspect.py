"""What a checkpoint is said to be."""

import hashlib

import pytest
import torch
from tiny_swins import green_swin, pretrained_file, pretrained_weights

from greenmim_mm.checkpoint import (
    FORMATS,
    CheckpointError,
    convert_file,
    convert_state_dict,
    inspect_checkpoint,
)


def test_pretraining_file(tmp_path):
    src = pretrained_file(tmp_path, window_size=(3, 3, 2, 2))
    found = inspect_checkpoint(src)
    assert found.format == 'greenmim_mm' and found.kind == 'GreenMIM pre-training'
    assert found.architecture.window_sizes == (3, 3, 2, 2)
    assert found.sha256 == hashlib.sha256(src.read_bytes()).hexdigest()
    assert found.size == src.stat().st_size
    backbone = green_swin(window_size=(3, 3, 2, 2))
    assert found.num_parameters == sum(value.numel() for value in backbone.parameters())
    decoder = [v for k, v in pretrained_weights().items() if k.startswith('neck.')]
    assert found.num_others == sum(value.numel() for value in decoder)
    assert found.dtypes == ('float32',)
    assert found.meta['epoch'] == 3
    assert found.others == ('optimizer',) and found.licence is None
    text = found.summary()
    for line in ('Swin V1', '3, 3, 2, 2', '2, 1, 2, 1', '1, 2, 2, 4', 'epoch', 'optimizer'):
        assert line in text
    assert found.sha256 in text


@pytest.mark.parametrize(
    ('target', 'version'), [(name, v) for name, entry in FORMATS.items() for v in entry.versions]
)
def test_every_format(tmp_path, target, version):
    dst = tmp_path / ('hf' if target == 'huggingface' else 'x.pth')
    convert_file(pretrained_file(tmp_path, version=version), dst, target)
    found = inspect_checkpoint(dst, target)
    assert found.architecture.version == version
    assert found.architecture.embed_dims == 8
    window = (2, 2, 2, 2)
    assert found.architecture.window_sizes == window
    assert found.num_parameters == sum(v.numel() for v in green_swin(version).parameters())
    assert found.meta['source_file'] == 'epoch_3.pth'
    assert ('CC BY-NC 4.0' in (found.licence or '')) == (target == 'greenmim')
    assert found.summary()


@pytest.mark.parametrize(
    'more, kind',
    [
        ({'head.fc.weight': (5, 64), 'head.fc.bias': (5,)}, 'classifier (5 classes)'),
        ({'rpn_head.rpn_conv.weight': (2, 2), 'roi_head.x': (1,)}, 'detector (backbone, rpn_head'),
        ({'backbone.norm1.weight': (16,), 'backbone.norm1.bias': (16,)}, 'norms for several'),
        ({}, 'backbone alone'),
    ],
)
def test_kinds(tmp_path, more, kind):
    weights = {k: v for k, v in pretrained_weights().items() if k.startswith('backbone.')}
    weights |= {key: torch.ones(shape) for key, shape in more.items()}
    torch.save({'state_dict': weights}, tmp_path / 'x.pth')
    source = 'mmpretrain' if 'head.fc.weight' in more else 'mmdet'
    assert kind in inspect_checkpoint(tmp_path / 'x.pth', source).kind


def test_authors_file(tmp_path):
    weights = convert_state_dict(pretrained_weights(), 'greenmim_mm', 'greenmim')
    torch.save({'model': weights, 'epoch': 799, 'optimizer': {}}, tmp_path / 'x.pth')
    found = inspect_checkpoint(tmp_path / 'x.pth')
    assert found.format == 'greenmim' and found.meta == {'epoch': 799}
    assert 'CC BY-NC 4.0' in found.summary() and '799' in found.summary()


def test_long_notes_are_shortened(tmp_path):
    meta = dict(cfg='line\n' * 10_000)
    torch.save({'state_dict': pretrained_weights(), 'meta': meta}, tmp_path / 'x.pth')
    text = inspect_checkpoint(tmp_path / 'x.pth').summary()
    assert len(text) < 3000 and 'line line' in text


def test_no_swin(tmp_path):
    torch.save({'state_dict': torch.nn.Linear(2, 2).state_dict()}, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=r'x\.pth: no known Swin format'):
        inspect_checkpoint(tmp_path / 'x.pth')
