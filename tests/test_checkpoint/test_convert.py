"""Conversion between formats: names, values, channel order, and the features that result."""

import re

import pytest
import torch
from mmdet.models.backbones.swin import SwinTransformer as MMDetSwin
from mmpretrain.models.backbones import SwinTransformer as MMPretrainSwin
from mmpretrain.models.backbones import SwinTransformerV2 as MMPretrainSwinV2
from swin_libraries import LIBRARIES, randomised
from torch import nn
from torchvision.models import resnet18

from greenmim_mm.checkpoint import (
    convert_state_dict,
    convert_with_report,
    detect_format,
)
from greenmim_mm.models import GreenMIMPretrainDecoder, GreenSwin
from greenmim_mm.ops import relative_position_index, resize_bias_table

ARCH = dict(embed_dims=8, depths=(2, 2, 2, 2), num_heads=(1, 2, 2, 4))
WINDOW = 3


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


def test_unknown_formats(pretrained):
    with pytest.raises(ValueError, match="'swin' is unknown; known formats: greenmim_mm, mmdet"):
        convert_state_dict(pretrained, 'swin', 'mmdet')
    with pytest.raises(
        ValueError, match='another architecture: 0 of 122 keys fit the format mmdet'
    ):
        convert_state_dict(resnet18().state_dict(), 'mmdet', 'mmpretrain')


@pytest.mark.parametrize(
    'key, value',
    [
        ('encoder.layers.0.downsample.reduction.weight', torch.zeros(16, 30)),
        ('encoder.layers.0.blocks.0.attn.relative_position_bias_table', torch.zeros(24, 1)),
        ('encoder.layers.0.blocks.0.attn.relative_position_bias_table', torch.zeros(())),
        ('encoder.patch_embed.proj.weight', torch.zeros(9, 3, 4, 4)),
        ('encoder.patch_embed.proj.weight', torch.zeros(8, 48)),
        ('encoder.layers.3.blocks.1.mlp.fc1.weight', torch.zeros(250, 64)),
        ('encoder.norm.bias', torch.zeros(32)),
    ],
)
def test_impossible_shapes(pretrained, key, value):
    authors = convert_state_dict(pretrained, 'greenmim_mm', 'greenmim')
    authors = {k: v for k, v in authors.items() if not k.endswith('relative_position_index')}
    assert key in authors
    authors[key] = value
    shape = re.escape(str(tuple(value.shape)))
    with pytest.raises(ValueError, match=rf'^{re.escape(key)} has shape {shape}.*it should be \('):
        convert_state_dict(authors, 'greenmim', 'mmdet')


@pytest.mark.parametrize('version', [1, 2])
@pytest.mark.parametrize('name', ['mmpretrain', 'timm', 'huggingface', 'torchvision'])
def test_one_wrong_shape_is_named(name, version):
    """Whichever layer it is, and not one of those that are right."""
    weights = LIBRARIES[name](version).state_dict()
    # Of buffers nothing is read. Of numbers that occur twice alone none has a majority: heads (in
    # two blocks), classes.
    buffers = ('position_index', 'coords_table')
    ties = ('bias_table', 'logit_scale', 'mlp.2.weight', 'head.fc.weight', 'head.weight')
    for key, value in weights.items():
        if key.endswith(buffers):
            continue
        longer = value.new_zeros(value.shape[0] + 1, *value.shape[1:])
        for wrong in [value[None]] + [longer] * (not key.endswith(ties)):
            with pytest.raises(ValueError, match='has shape') as error:
                convert_state_dict(weights | {key: wrong}, name, 'mmpretrain')
            assert str(error.value).startswith(f'{key} has shape {tuple(wrong.shape)}')


def test_half_of_the_keys(pretrained):
    for half in (list(pretrained)[::2], list(pretrained)[: len(pretrained) // 2]):
        with pytest.raises(ValueError, match='no whole Swin'):
            convert_state_dict({key: pretrained[key] for key in half}, 'auto', 'mmdet')


TABLE = 'attn.w_msa.relative_position_bias_table'
INDEX = 'attn.w_msa.relative_position_index'


@pytest.mark.parametrize('windows', [7, (6, 7, 12, 3)])
def test_window_size(pretrained, windows):
    sizes = (windows,) * 4 if isinstance(windows, int) else windows
    converted, report = convert_with_report(pretrained, 'greenmim_mm', 'mmdet', windows)
    for stage, size in enumerate(sizes):
        for block in range(2):
            table = f'backbone.stages.{stage}.blocks.{block}.{TABLE}'
            expected = resize_bias_table(pretrained[table], (2 * size - 1) ** 2)
            assert torch.equal(converted[table], expected)
            index = table.replace('bias_table', 'index')
            assert torch.equal(converted[index], relative_position_index(size))
            if size == WINDOW:
                assert report.mapped[table] == table and report.mapped[index] == index
            else:
                assert report.transformed[table] == (table, f'window 3 to {size} resized')
                assert report.transformed[index] == (index, f'buffer of window {size}')
    swin = MMDetSwin(embed_dims=8, depths=(2, 2, 2, 2), num_heads=(1, 2, 2, 4), window_size=7)
    if windows == 7:
        keys = swin.load_state_dict(
            {k.removeprefix('backbone.'): v for k, v in converted.items()}, strict=False
        )
        assert {f'backbone.{key}' for key in keys.missing_keys} == report.missing.keys()
        assert keys.unexpected_keys == []
    # The window travels through formats that have no index, and one that has a flat one.
    timm = convert_state_dict(pretrained, 'greenmim_mm', 'timm', windows)
    for other in ('torchvision', 'huggingface'):
        there = convert_state_dict(timm, 'timm', other)
        back = convert_state_dict(there, other, 'mmdet')
        assert_equal(back, {key: value for key, value in converted.items() if key in back})


@pytest.mark.parametrize(('old', 'new'), [(6, 7), (7, 12)])
def test_features_after_a_change_of_window(old, new):
    torch.manual_seed(0)
    arch = dict(ARCH, embed_dims=32)
    backbone = GreenSwin(arch, window_size=old, pad_small_map=True, out_indices=(0, 1, 2, 3))
    backbone.init_weights()
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if name.endswith('bias_table'):
                parameter.copy_(torch.linspace(-1, 1, len(parameter))[:, None].sin())
    weights = {'backbone.' + key: value for key, value in backbone.state_dict().items()}
    converted, report = convert_with_report(weights, 'auto', 'mmdet', new)
    assert f'transformed 8 (window {old} to {new} resized)' in report.summary()
    swin = MMDetSwin(embed_dims=32, depths=(2, 2, 2, 2), num_heads=(1, 2, 2, 4), window_size=new)
    swin.load_state_dict({k.removeprefix('backbone.'): v for k, v in converted.items()})
    swin.eval()
    images = torch.randn(1, 3, 336, 336)
    with torch.no_grad():
        for ours, theirs in zip(backbone.eval()(images), swin(images), strict=True):
            assert theirs.isfinite().all()
            assert torch.cosine_similarity(ours, theirs, dim=1).min() > 0.9


@pytest.mark.parametrize('windows', [0, (7, 7, 7), (7, 7, 7, 0), 7.0, True])
def test_bad_window_size(pretrained, windows):
    with pytest.raises(ValueError, match='window_size=.* must be a positive integer or 4'):
        convert_state_dict(pretrained, 'greenmim_mm', 'mmdet', windows)


def test_window_size_of_v2():
    """No learned parameter changes; buffers remember the window of the pre-training."""
    source = LIBRARIES['torchvision'](2).state_dict()
    kept = convert_state_dict(source, 'torchvision', 'mmpretrain')
    converted, report = convert_with_report(source, 'torchvision', 'mmpretrain', 8)
    arch = dict(ARCH, extra_norm_every_n_blocks=0)
    expected = MMPretrainSwinV2(
        arch=arch, window_size=8, img_size=512, pretrained_window_sizes=[4] * 4
    ).state_dict()
    buffers = 0
    for key, value in expected.items():
        ours = converted['backbone.' + key]
        if key.endswith(('relative_position_index', 'relative_coords_table')):
            buffers += 1
            torch.testing.assert_close(ours, value, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(ours, kept['backbone.' + key])
    assert buffers == 16
    assert not report.missing
    reasons = {how for _, how in report.transformed.values()}
    assert 'buffer of window 8, pre-trained with 4' in reasons
    assert not any('resized' in reason for reason in reasons)
    # Formats without buffers do not tell the window; it can be said.
    bare = convert_state_dict(source, 'torchvision', 'timm')
    _, report = convert_with_report(bare, 'timm', 'torchvision')
    assert len(report.missing) == 16
    again, report = convert_with_report(bare, 'timm', 'torchvision', 4)
    assert not report.missing
    for key, value in source.items():
        torch.testing.assert_close(again[key], value, rtol=1e-6, atol=1e-6)


def test_lost_parameters():
    weights = {'backbone.' + k: v for k, v in LIBRARIES['mmpretrain'](1).state_dict().items()}
    position = {'backbone.absolute_pos_embed': torch.rand(1, 4096, 8)}
    converted, report = convert_with_report(weights | position, 'mmpretrain', 'microsoft')
    assert 'absolute_pos_embed' in converted and report.lossless
    for target in ('greenmim_mm', 'timm', 'torchvision', 'huggingface', 'detectron2'):
        _, report = convert_with_report(weights | position, 'mmpretrain', target)
        assert report.lost == list(position)
        assert not report.lossless
        assert 'LOST 1: backbone.absolute_pos_embed' in report.summary()
        assert (
            report.dropped[report.lost[0]]
            == f'absolute position embedding has no place in {target}'
        )
    # Names that nobody knows.
    _, report = convert_with_report(weights | {'backbone.novel': torch.zeros(1)}, 'mmdet', 'mmdet')
    assert report.lost == report.unknown == ['backbone.novel']
    # The largest Swin V2 have norms that only OpenMMLab has a place for.
    giant = MMPretrainSwinV2(arch=dict(ARCH, extra_norm_every_n_blocks=2), window_size=4)
    giant = {'backbone.' + key: value for key, value in giant.state_dict().items()}
    assert convert_with_report(giant, 'mmpretrain', 'greenmim_mm')[1].lossless
    _, report = convert_with_report(giant, 'mmpretrain', 'timm')
    assert len(report.lost) == 8 and all('.blocks.1.norm3.' in key for key in report.lost)


def test_missing_norms_and_heads(pretrained):
    norms = {f'norm{stage}.{p}' for stage in range(3) for p in ('weight', 'bias')}
    _, report = convert_with_report(pretrained, 'greenmim_mm', 'mmdet')
    assert report.missing.keys() == {'backbone.' + name for name in norms}
    _, report = convert_with_report(pretrained, 'greenmim_mm', 'detectron2')
    assert report.missing.keys() == {'backbone.bottom_up.' + name for name in norms}
    _, report = convert_with_report(pretrained, 'greenmim_mm', 'timm')
    assert report.missing.keys() == {'head.fc.weight', 'head.fc.bias'}
    assert 'missing 2 (classification head is not in the source' in report.summary()
    # And the other way round.
    detector, _ = convert_with_report(pretrained, 'greenmim_mm', 'mmdet')
    detector |= {f'backbone.{name}': torch.rand(8 << int(name[4])) for name in norms}
    _, report = convert_with_report(detector, 'mmdet', 'timm')
    assert report.lossless
    dropped = {key: why for key, why in report.dropped.items() if 'computed' not in why}
    assert dropped == {
        f'backbone.{name}': 'norm of an output has no place in timm' for name in norms
    }


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_types_are_kept(pretrained, dtype):
    weights = {k: v.to(dtype) if v.is_floating_point() else v for k, v in pretrained.items()}
    backbone = {key: value for key, value in weights.items() if key.startswith('backbone.')}
    for target in ('timm', 'huggingface', 'torchvision'):
        there = convert_state_dict(weights, 'greenmim_mm', target)
        assert {v.dtype for v in there.values() if v.is_floating_point()} == {dtype}
        assert_equal(convert_state_dict(there, target, 'mmdet'), backbone)


def test_results_share_no_memory(pretrained):
    """safetensors refuses it; and writing to one must not change another."""
    converted = convert_state_dict(pretrained, 'greenmim_mm', 'huggingface')
    storages = [value.untyped_storage().data_ptr() for value in converted.values()]
    assert len(set(storages)) == len(storages)


def test_split_query_key_value(pretrained):
    converted, report = convert_with_report(pretrained, 'greenmim_mm', 'huggingface')
    ours = 'backbone.stages.1.blocks.0.attn.w_msa.qkv.weight'
    theirs = [
        f'encoder.layers.1.blocks.0.attention.self.{part}.weight'
        for part in ('query', 'key', 'value')
    ]
    assert report.transformed[ours] == (', '.join(theirs), 'query, key and value split')
    for number, key in enumerate(theirs):
        assert torch.equal(converted[key], pretrained[ours][16 * number : 16 * (number + 1)])


PARTS = {
    'stages.1.blocks.0.': 13,
    'stages.3.': 13,
    'patch_embed.': 4,
    'stages.0.downsample.': 3,
    'stages.2.blocks.1.attn.w_msa.qkv.bias': 1,
    'stages.2.blocks.0.norm1.bias': 1,
}


@pytest.mark.parametrize(('removed', 'lacking'), PARTS.items())
def test_parts_are_refused(pretrained, removed, lacking):
    weights = {k: v for k, v in pretrained.items() if not k.startswith('backbone.' + removed)}
    with pytest.raises(
        ValueError, match=rf'no whole Swin: .* but {lacking} are lacking, e.g. backbone.{removed}'
    ):
        convert_state_dict(weights, 'greenmim_mm', 'mmdet')


@pytest.mark.parametrize('number', [2, 9999, 10**12])
def test_a_block_is_skipped(pretrained, number):
    weights = {
        key.replace('stages.1.blocks.1.', f'stages.1.blocks.{number}.'): value
        for key, value in pretrained.items()
    }
    if number > 9999:  # No network has so many.
        _, report = convert_with_report(weights, 'greenmim_mm', 'mmdet')
        assert len(report.lost) == 14
        return
    with pytest.raises(ValueError, match=r'no whole Swin: .*stages\.1\.blocks\.1\.'):
        convert_state_dict(weights, 'greenmim_mm', 'mmdet')
