"""The proof that a file holds the same network: it passes for right files and fails for others."""

import builtins
import sys

import pytest
import torch
from tiny_swins import pretrained_file, pretrained_weights

from greenmim_mm.checkpoint import FORMATS, convert, convert_file, convert_state_dict
from greenmim_mm.verification import VerificationError, verify, verify_network

LIBRARIES = ('mmdet', 'mmpretrain', 'timm', 'huggingface', 'torchvision')


def destination(folder, target, suffix='.pth'):
    return folder / ('hf' if target == 'huggingface' else f'{target}{suffix}')


@pytest.mark.parametrize(
    ('target', 'version'), [(name, v) for name, entry in FORMATS.items() for v in entry.versions]
)
def test_every_target(tmp_path, target, version):
    src = pretrained_file(tmp_path, version=version)
    dst = destination(tmp_path, target)
    found = convert_file(src, dst, target, verify=verify_network).verification
    assert found.passed and found.largest < 1e-5
    assert {f'stage {stage}' for stage in range(4)} <= found.differences.keys()
    assert 'norm 3' in found.differences
    own_library = target in LIBRARIES and (target, version) != ('mmdet', 2)
    assert found.independent == (own_library or target == 'greenmim_mm')
    assert ('converted back' in found.summary()) != found.independent
    # The same, asked for later and in the other direction: the file is the source now.
    assert verify(src, dst, target=target).differences == found.differences
    convert_file(dst, tmp_path / 'back.pth', 'mmpretrain', target, verify=verify_network)
    # A file of the same network, but with other numbers.
    other = pretrained_weights(version)
    other['backbone.stages.1.blocks.0.norm2.bias'] += 0.01
    torch.save({'state_dict': other}, tmp_path / 'other.pth')
    with pytest.raises(VerificationError, match=r'not the same network.*stage 1 \d'):
        verify(tmp_path / 'other.pth', dst, target=target)


@pytest.mark.parametrize('target', LIBRARIES)
def test_other_windows(tmp_path, target):
    src = pretrained_file(tmp_path)
    result = convert_file(
        src, destination(tmp_path, target), target, window_size=3, verify=verify_network
    )
    assert result.verification.side == 96
    assert result.architecture.window_size == 3


@pytest.mark.parametrize('dtype', ['fp16', 'bf16'])
def test_rounded_numbers_are_the_same_network(tmp_path, dtype):
    src = pretrained_file(tmp_path)
    for target in ('timm', 'huggingface'):
        dst = destination(tmp_path, target)
        assert convert_file(
            src, dst, target, dtype=dtype, verify=verify_network
        ).verification.passed


def test_windows_of_their_own_per_stage(tmp_path):
    src = pretrained_file(tmp_path, window_size=(4, 4, 4, 2))
    for target in ('timm', 'mmpretrain'):
        found = convert_file(
            src, destination(tmp_path, target), target, verify=verify_network
        ).verification
        assert found.largest < 1e-5
    for target in ('mmdet', 'torchvision', 'huggingface'):
        with pytest.raises(ValueError, match=r'one window size.*--window-size'):
            convert_file(src, destination(tmp_path, target), target, verify=verify_network)
        assert not destination(tmp_path, target).exists()
        convert_file(
            src, destination(tmp_path, target), target, verify=verify_network, window_size=4
        )


@pytest.mark.parametrize('target', LIBRARIES)
@pytest.mark.parametrize('fault', ['merging', 'missing', 'extra', 'qkv'])
def test_wrong_conversions_are_found(tmp_path, monkeypatch, target, fault):
    """Mistakes that a converter could make; nothing may be left of the file."""

    def faulty(*args):
        spelled = spell(*args)
        state_dict = dict(spelled.state_dict)
        merging = next(k for k in state_dict if k.endswith('reduction.weight'))
        query = next(
            k for k in state_dict if k.endswith(('qkv.weight', 'attention.self.query.weight'))
        )
        if fault == 'merging':
            state_dict[merging] = state_dict[merging].roll(1, dims=1)
        elif fault == 'qkv':
            state_dict[query] = state_dict[query].roll(1, dims=0)
        elif fault == 'missing':
            del state_dict[merging]
        else:
            state_dict[merging.replace('reduction.weight', 'reduction.extra')] = torch.zeros(1)
        return spelled._replace(state_dict=state_dict)

    spell = convert.spell
    src = pretrained_file(tmp_path)
    monkeypatch.setattr(convert, 'spell', faulty)
    message = 'not the same network' if fault in ('merging', 'qkv') else 'does not accept the file'
    with pytest.raises(VerificationError, match=message):
        convert_file(src, destination(tmp_path, target), target, verify=verify_network)
    assert [path.name for path in tmp_path.iterdir()] == [src.name]


@pytest.mark.parametrize('target', LIBRARIES)
def test_missing_library(tmp_path, monkeypatch, target):
    package = 'transformers' if target == 'huggingface' else target
    src = pretrained_file(tmp_path)
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split('.')[0] == package:
            raise ModuleNotFoundError(f'No module named {package!r}', name=package)
        return real_import(name, *args, **kwargs)

    def verify_without(*args):
        for name in [n for n in sys.modules if n.split('.')[0] == package]:
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setattr(builtins, '__import__', without)
        return verify_network(*args)

    with pytest.raises(ImportError, match=f'needs the package {package}'):
        convert_file(src, destination(tmp_path, target), target, verify=verify_without)
    assert [path.name for path in tmp_path.iterdir()] == [src.name]


def test_global_random_numbers_are_left_alone(tmp_path):
    src = pretrained_file(tmp_path)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    convert_file(src, tmp_path / 'x.pth', 'timm', verify=verify_network)
    assert torch.equal(torch.rand(1), expected)


def test_verify_needs_a_window_of_v2(tmp_path):
    src = tmp_path / 'timm.pth'
    torch.save(convert_state_dict(pretrained_weights(2), 'greenmim_mm', 'timm'), src)
    with pytest.raises(ValueError, match='--window-size'):
        convert_file(src, tmp_path / 'x.pth', 'timm', verify=verify_network)
    convert_file(
        src,
        tmp_path / 'x.pth',
        'timm',
        verify=verify_network,
        window_size=2,
        pretrained_window_size=2,
    )
