"""Architectures read off parameters, and the errors that name a wrong one."""

import pytest
import torch
from tiny_swins import ARCH, green_swin
from torch import nn

from greenmim_mm.checkpoint import (
    Architecture,
    CheckpointError,
    check_finite,
    infer_architecture,
)
from greenmim_mm.checkpoint.architecture import parameter_shapes
from greenmim_mm.models import GreenSwin, GreenSwinV2

TABLE = 'stages.2.blocks.1.attn.w_msa.relative_position_bias_table'


def on_meta(kind, *args, **kwargs) -> nn.Module:
    """A model without values: the large ones would take long to initialise."""
    with torch.device('meta'):
        return kind(*args, **kwargs)


@pytest.mark.parametrize(
    'changes',
    [
        {},
        dict(window_size=(5, 4, 3, 2)),
        dict(mlp_ratio=2.5),
        dict(qkv_bias=False),
        dict(in_channels=1),
        dict(out_indices=(0, 2)),
    ],
)
@pytest.mark.parametrize('version', [1, 2])
def test_every_size_is_found(version, changes):
    backbone = green_swin(version, **changes)
    found = infer_architecture(backbone.state_dict())
    assert found.version == version
    assert (found.embed_dims, found.depths, found.num_heads) == (8, (2, 1, 2, 1), (1, 2, 2, 4))
    assert found.window_sizes == changes.get('window_size', (2, 2, 2, 2))
    assert found.mlp_ratio == changes.get('mlp_ratio', 4)
    assert found.qkv_bias == changes.get('qkv_bias', True)
    assert found.in_channels == changes.get('in_channels', 3)
    assert found.output_norms == changes.get('out_indices', (3,))
    assert found.patch_size == 4
    parameters = {name: tuple(value.shape) for name, value in backbone.named_parameters()}
    assert parameter_shapes(found) == parameters


@pytest.mark.parametrize('name', ['tiny', 'small', 'base', 'large'])
def test_names(name):
    found = infer_architecture(on_meta(GreenSwin, name).state_dict())
    assert found.name == name
    assert found.window_size == 7
    assert f'Swin V1 {name}' in found.describe()
    assert infer_architecture(green_swin().state_dict()).name is None


def test_extra_norms_of_large_v2():
    arch = dict(embed_dims=8, depths=(1, 1, 6, 4), num_heads=(1, 1, 1, 1))
    backbone = GreenSwinV2(dict(arch, extra_norm_every_n_blocks=3), window_size=2)
    found = infer_architecture(backbone.state_dict())
    assert found.extra_norm_every == 3
    assert parameter_shapes(found).keys() == dict(backbone.named_parameters()).keys()


def test_v2_without_buffers_does_not_tell_its_window():
    weights = dict(green_swin(2, window_size=4).named_parameters())
    found = infer_architecture(weights)
    assert found.window_sizes is None and found.window_size is None
    assert 'window unknown' in found.describe()
    assert found.pretrained_window_sizes is None and not found.scale_is_known
    found = infer_architecture(green_swin(2, window_size=4).state_dict())
    found = found.with_window((8, 8, 8, 4))
    assert found.window_sizes == (8, 8, 8, 4)
    assert found.pretrained_window_sizes == (4, 4, 4, 4)


def test_pretraining_windows_of_v2():
    weights = green_swin(2, window_size=4, pretrained_window_sizes=(3, 3, 3, 3)).state_dict()
    assert infer_architecture(weights).pretrained_window_sizes == (3, 3, 3, 3)
    # Stated outright, be they those in use or not.
    found = infer_architecture(green_swin(2).state_dict())
    assert found.pretrained_window_sizes == (2, 2, 2, 2) and found.foreign_scale is None


@pytest.mark.parametrize('version', [1, 2])
@pytest.mark.parametrize(
    'leaf',
    [
        'patch_embed.projection.bias',
        'patch_embed.norm.weight',
        'stages.0.blocks.1.norm1.weight',
        'stages.2.blocks.0.attn.w_msa.qkv.weight',
        'stages.2.blocks.1.ffn.layers.0.0.weight',
        'stages.3.blocks.0.ffn.layers.1.weight',
        'stages.1.downsample.norm.bias',
        'norm3.weight',
    ],
)
def test_wrong_shapes_are_named(version, leaf):
    weights = green_swin(version).state_dict()
    right = tuple(weights[leaf].shape)
    for wrong in ((right[0] + 1, *right[1:]), (*right, 1)):
        with pytest.raises(CheckpointError) as error:
            infer_architecture({**weights, leaf: torch.zeros(wrong)}, {leaf: 'its own name'}.get)
        assert str(error.value).startswith(f'its own name has shape {wrong}')
        assert str(right) in str(error.value)


@pytest.mark.parametrize('shape', [(25, 2), (9, 3), (10, 2), (9,)])
def test_wrong_tables_are_named(shape):
    weights = {**green_swin().state_dict(), TABLE: torch.zeros(shape)}
    with pytest.raises(CheckpointError, match=r'stages\.2\.blocks\.1\..*should be \(9, 2\)'):
        infer_architecture(weights)


def test_heads_must_divide_the_channels():
    key = 'stages.1.blocks.0.attn.w_msa.relative_position_bias_table'
    weights = {**green_swin().state_dict(), key: torch.zeros(9, 3)}
    with pytest.raises(CheckpointError, match=r'^mine has shape \(9, 3\) for 3 heads.*16 channels'):
        infer_architecture(weights, {key: 'mine'}.get)


@pytest.mark.parametrize(
    'removed, count, example',
    [
        ('stages.0.blocks.0.attn.w_msa.relative_position_bias_table', 1, 'bias_table'),
        ('stages.2.blocks.0.', 13, r'stages\.2\.blocks'),
        ('stages.3.', 13, r'stages\.3\.blocks\.0\.norm1\.weight'),
        ('stages.1.downsample.', 3, r'stages\.1\.downsample'),
        ('patch_embed.', 4, r'patch_embed\.projection\.weight'),
        ('stages.2.blocks.1.attn.w_msa.qkv.bias', 1, r'qkv\.bias'),
    ],
)
def test_missing_parameters_are_named(removed, count, example):
    weights = {k: v for k, v in green_swin().state_dict().items() if not k.startswith(removed)}
    with pytest.raises(CheckpointError, match=rf'no whole Swin.*{count} are lacking.*{example}'):
        infer_architecture(weights)


def test_other_networks():
    with pytest.raises(CheckpointError, match=r'this is no Swin: none of 2 keys.*weight'):
        infer_architecture(nn.Linear(2, 2).state_dict())
    weights = green_swin().state_dict() | {'stages.0.blocks.0.gamma': torch.zeros(8)}
    with pytest.raises(CheckpointError, match=r'another architecture.*no stages\.0\.blocks\.0\.g'):
        infer_architecture(weights)
    # A name alone must not make it count to a billion.
    weights = green_swin().state_dict() | {'stages.0.blocks.999999999.norm1.weight': torch.ones(8)}
    with pytest.raises(CheckpointError, match='another architecture|no whole Swin'):
        infer_architecture(weights)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_not_finite(dtype):
    values = torch.ones(3, 4, dtype=dtype)
    check_finite({'a': values, 'index': torch.arange(3), 'empty': torch.zeros(0)})
    values[0, 1], values[1, 1], values[2, 2] = float('nan'), float('inf'), -float('inf')
    with pytest.raises(CheckpointError, match=r'^b has 1 NaN and 2 infinite of 12 values$'):
        check_finite({'a': torch.ones(2), 'b': values})
    with pytest.raises(CheckpointError, match=r'^b has .*, and 1 more tensors'):
        check_finite({'b': values, 'c': values})
    # The sum of large values is infinite, the values are not.
    check_finite({'a': torch.full((9,), torch.finfo(dtype).max, dtype=dtype)})


@pytest.mark.parametrize('window', [0, -1, (7, 7), (7, 7, 7, 0), (7, 7, 7, 7.0)])
def test_wrong_windows(window):
    arch = Architecture(1, window_sizes=(7, 7, 7, 7), **ARCH)
    with pytest.raises(ValueError, match='positive integer or 4 of them'):
        arch.with_window(window)


@pytest.mark.parametrize('version', [1, 2])
def test_empty_layers_and_endless_offsets(version):
    """Values that nobody trains; a crafted file must end in a sentence, not in a traceback."""
    weights = green_swin(version).state_dict()
    empty = {key: value[:0] for key, value in weights.items()}
    with pytest.raises(CheckpointError, match='has shape'):
        infer_architecture(empty)
    if version == 2:
        coords = {k: v * 1e30 for k, v in weights.items() if k.endswith('coords_table')}
        with pytest.raises(CheckpointError, match='no offsets'):
            infer_architecture(weights | coords)
