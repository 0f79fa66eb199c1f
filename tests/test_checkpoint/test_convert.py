"""Conversion between formats: names, values, channel order, and the features that result."""

import hashlib

import pytest
import torch
from mmdet.models.backbones.swin import SwinTransformer as MMDetSwin
from mmpretrain.models.backbones import SwinTransformer as MMPretrainSwin
from torch import nn
from torchvision.models import resnet18

from greenmim_mm.checkpoint import (
    FORMATS,
    CheckpointError,
    convert_file,
    convert_state_dict,
    convert_with_report,
    detect_format,
)
from greenmim_mm.models import GreenMIMPretrainDecoder, GreenSwin
from greenmim_mm.version import __version__

ARCH = dict(embed_dims=8, depths=(2, 2, 2, 2), num_heads=(1, 2, 2, 4))
WINDOW = 3


def randomised(module: nn.Module) -> nn.Module:
    """Every parameter random: zeros and ones would hide a wrong order."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2)
    return module.eval()


@pytest.fixture
def backbone() -> GreenSwin:
    torch.manual_seed(0)
    return randomised(
        GreenSwin(ARCH, window_size=WINDOW, pad_small_map=True, out_indices=(0, 1, 2, 3))
    )


@pytest.fixture
def pretrained() -> dict:
    """Parameters of a pre-trained model: backbone with the last norm alone, and decoder."""
    torch.manual_seed(1)
    backbone = randomised(GreenSwin(ARCH, window_size=WINDOW))
    decoder = randomised(GreenMIMPretrainDecoder(64, 16, decoder_depth=2, decoder_num_heads=2))
    return {
        **{'backbone.' + key: value for key, value in backbone.state_dict().items()},
        **{'neck.' + key: value for key, value in decoder.state_dict().items()},
    }


def assert_equal(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert value.dtype == second[key].dtype
        assert torch.equal(value, second[key]), key


def test_round_trip_is_bit_exact(pretrained):
    authors, report = convert_with_report(pretrained, 'greenmim_mm', 'greenmim')
    assert not report.dropped
    assert len(report.transformed) == 9  # three mergings: reduction, and the norm's two
    assert 'encoder.layers.2.blocks.1.mlp.fc2.bias' in authors
    assert 'encoder.norm.weight' in authors
    assert 'decoder_blocks.1.attn.qkv.weight' in authors
    assert detect_format(list(authors)) == 'greenmim'
    changed = authors['encoder.layers.0.downsample.reduction.weight']
    assert not torch.equal(changed, pretrained['backbone.stages.0.downsample.reduction.weight'])
    assert_equal(convert_state_dict(authors, 'greenmim', 'greenmim_mm'), pretrained)


def test_merging_order_against_loops(pretrained):
    authors = convert_state_dict(pretrained, 'greenmim_mm', 'greenmim')
    for stage in range(3):
        channels = ARCH['embed_dims'] << stage
        for leaf in ('reduction.weight', 'norm.weight', 'norm.bias'):
            ours = pretrained[f'backbone.stages.{stage}.downsample.{leaf}']
            theirs = authors[f'encoder.layers.{stage}.downsample.{leaf}']
            for channel in range(channels):
                for row in range(2):
                    for column in range(2):
                        unfold = 4 * channel + 2 * row + column
                        place_first = channels * (2 * column + row) + channel
                        assert torch.equal(ours[..., unfold], theirs[..., place_first])


def test_merging_computes_the_same(pretrained):
    """Merging as Microsoft's code writes it, with the authors' values, and nn.Unfold with ours."""
    authors = convert_state_dict(pretrained, 'greenmim_mm', 'greenmim')
    image = torch.rand(2, 6, 4, 8, dtype=torch.float64)
    places = [image[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
    unfolded = nn.functional.unfold(image.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)
    results = []
    for cells, weights, prefix in (
        (torch.cat(places, dim=-1).flatten(1, 2), authors, 'encoder.layers.0.'),
        (unfolded, pretrained, 'backbone.stages.0.'),
    ):
        weight, bias, reduction = (
            weights[prefix + 'downsample.' + leaf].double()
            for leaf in ('norm.weight', 'norm.bias', 'reduction.weight')
        )
        x = nn.functional.layer_norm(cells, cells.shape[-1:], weight, bias)
        results.append(x @ reduction.t())
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('target', ['mmdet', 'mmpretrain'])
def test_decoder_is_dropped_and_named(pretrained, target):
    converted, report = convert_with_report(pretrained, 'greenmim_mm', target)
    assert_equal(converted, {k: v for k, v in pretrained.items() if k.startswith('backbone.')})
    assert report.dropped.keys() == {k for k in pretrained if k.startswith('neck.')}
    assert not report.unknown
    assert 'pre-training decoder' in report.summary()


def test_index_buffers_are_added(pretrained):
    index = {k: v for k, v in pretrained.items() if k.endswith('relative_position_index')}
    bare = {k: v for k, v in pretrained.items() if k not in index}
    converted, report = convert_with_report(bare, 'greenmim_mm', 'mmdet')
    assert len(index) == 8
    assert report.added.keys() == index.keys()
    assert_equal({k: converted[k] for k in index}, index)


def test_every_key_is_accounted_for(pretrained):
    extra = {'backbone.novel': torch.zeros(1), 'data_preprocessor.mean': torch.zeros(3)}
    converted, report = convert_with_report({**pretrained, **extra}, 'greenmim_mm', 'mmdet')
    assert report.unknown == ['backbone.novel']
    accounts = [report.mapped, report.transformed, report.dropped]
    assert sorted(key for account in accounts for key in account) == sorted({**pretrained, **extra})
    assert set(report.mapped.values()) == converted.keys()


@pytest.mark.parametrize('height, width', [(96, 96), (64, 100)])
def test_mmdet_gives_the_same_features(backbone, height, width):
    swin = MMDetSwin(
        embed_dims=8,
        depths=(2, 2, 2, 2),
        num_heads=(1, 2, 2, 4),
        window_size=WINDOW,
        out_indices=(0, 1, 2, 3),
    )
    state_dict = {'backbone.' + key: value for key, value in backbone.state_dict().items()}
    authors = convert_state_dict(state_dict, 'mmdet', 'greenmim')
    # The authors' file has no norm of the inner outputs.
    assert not any(key.startswith('encoder.norm0') for key in authors)
    converted = convert_state_dict(authors, 'greenmim', 'mmdet')
    converted.update({k: v for k, v in state_dict.items() if k.split('.')[1][:4] == 'norm'})
    swin.load_state_dict({k.removeprefix('backbone.'): v for k, v in converted.items()})
    swin.eval()
    images = torch.randn(2, 3, height, width)
    with torch.no_grad():
        for ours, theirs in zip(backbone(images), swin(images), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_mmpretrain_gives_the_same_features(backbone):
    swin = MMPretrainSwin(
        arch={**ARCH, 'depths': list(ARCH['depths'])},
        img_size=96,
        out_indices=(0, 1, 2, 3),
        stage_cfgs=dict(block_cfgs=dict(window_size=WINDOW)),
        pad_small_map=True,
    )
    state_dict = {'backbone.' + key: value for key, value in backbone.state_dict().items()}
    converted = convert_state_dict(state_dict, 'mmdet', 'mmpretrain')
    swin.load_state_dict({k.removeprefix('backbone.'): v for k, v in converted.items()})
    swin.eval()
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        for ours, theirs in zip(backbone(images), swin(images), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_formats_are_told_apart(pretrained):
    assert detect_format(list(pretrained)) == 'greenmim_mm'
    backbone = [key for key in pretrained if key.startswith('backbone.')]
    assert detect_format(backbone) == 'mmdet'
    half = [f'unknown.{index}' for index in range(len(backbone))]
    assert detect_format(backbone + half[1:]) == 'mmdet'
    for keys in (backbone + half, half, []):
        known = len(backbone) if keys[: len(backbone)] == backbone else 0
        with pytest.raises(ValueError, match=rf'mmdet knows {known} of {len(keys)} keys'):
            detect_format(keys)


def test_unknown_formats(pretrained):
    with pytest.raises(ValueError, match="'swin' is unknown; known formats: greenmim_mm, mmdet"):
        convert_state_dict(pretrained, 'swin', 'mmdet')
    with pytest.raises(ValueError, match='none of the 122 keys fits the format mmdet'):
        convert_state_dict(resnet18().state_dict(), 'mmdet', 'mmpretrain')


@pytest.mark.parametrize(
    'key, value',
    [
        ('encoder.layers.0.downsample.reduction.weight', torch.zeros(16, 30)),
        ('encoder.layers.0.blocks.0.attn.relative_position_bias_table', torch.zeros(24, 1)),
        ('encoder.layers.0.blocks.0.attn.relative_position_bias_table', torch.zeros(())),
    ],
)
def test_impossible_shapes(pretrained, key, value):
    authors = convert_state_dict(pretrained, 'greenmim_mm', 'greenmim')
    authors = {k: v for k, v in authors.items() if not k.endswith('relative_position_index')}
    authors[key] = value
    with pytest.raises(ValueError, match='shape'):
        convert_state_dict(authors, 'greenmim', 'mmdet')


def test_convert_file(tmp_path, pretrained):
    authors = convert_state_dict(pretrained, 'greenmim_mm', 'greenmim')
    src, dst = tmp_path / 'authors.pth', tmp_path / 'swin.pth'
    torch.save({'model': authors, 'optimizer': {}, 'epoch': 3}, src)
    report = convert_file(src, dst, 'mmpretrain')
    written = torch.load(dst, weights_only=True)
    assert written.keys() == {'meta', 'state_dict'}
    assert written['meta'] == dict(
        source_file='authors.pth',
        source_sha256=hashlib.sha256(src.read_bytes()).hexdigest(),
        source_format='greenmim',
        format='mmpretrain',
        greenmim_mm_version=__version__,
        licence='weights published by the GreenMIM authors are CC BY-NC 4.0',
    )
    assert_equal(
        written['state_dict'], {k: v for k, v in pretrained.items() if k.startswith('backbone.')}
    )
    assert (report.source, report.target) == ('greenmim', 'mmpretrain')
    assert report.left_out == ('optimizer', 'epoch')
    # And on to a file as the authors write it.
    convert_file(dst, tmp_path / 'back.pth', 'greenmim', 'mmpretrain')
    assert torch.load(tmp_path / 'back.pth', weights_only=True).keys() == {'meta', 'model'}


@pytest.mark.parametrize(
    'removed, lacking',
    [
        ('logit', 8),  # as in Swin V2, whose blocks have other attention
        ('stages.1.blocks.0.', 7),
        ('stages.3.', 7),
        ('patch_embed.', 1),
        ('stages.0.downsample.', 1),
    ],
)
def test_convert_file_refuses_parts(tmp_path, pretrained, removed, lacking):
    if removed == 'logit':
        weights = {
            k.replace('relative_position_bias_table', removed): pretrained[k] for k in pretrained
        }
    else:
        weights = {k: v for k, v in pretrained.items() if not k.startswith('backbone.' + removed)}
    src = tmp_path / 'src.pth'
    torch.save({'state_dict': weights}, src)
    with pytest.raises(CheckpointError, match=rf'no whole Swin: .* but {lacking} are lacking'):
        convert_file(src, tmp_path / 'dst.pth', 'mmdet')
    assert not (tmp_path / 'dst.pth').exists()


def test_convert_file_never_replaces_its_source(tmp_path, pretrained):
    src = tmp_path / 'src.pth'
    torch.save({'state_dict': pretrained}, src)
    with pytest.raises(FileExistsError, match='is the source itself'):
        convert_file(src, src, 'mmdet', force=True)
    assert len(torch.load(src)['state_dict']) == len(pretrained)


def test_format_tables_have_one_name_each():
    for entry in FORMATS.values():
        own, other = zip(*entry.renames, strict=True)
        assert len(set(own)) == len(own)
        assert len(set(other)) == len(other)
