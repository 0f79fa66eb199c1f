"""Every format to every other: round trips are exact, and libraries compute the same features."""

from functools import lru_cache

import pytest
import torch
from swin_libraries import (
    LIBRARIES,
    OWN_NORMS,
    green,
    huggingface_swin,
    randomised,
    stage_maps,
    timm_swin,
    torchvision_swin,
)
from torch import Tensor, nn

from greenmim_mm.checkpoint import (
    FORMATS,
    convert_state_dict,
    convert_with_report,
    detect_format,
)
from greenmim_mm.models import GreenMIMPretrainDecoder
from greenmim_mm.ops import relative_position_index

CASES_V1 = list(FORMATS)
CASES_V2 = [name for name, entry in FORMATS.items() if 2 in entry.versions]


def prefixed(prefix: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state_dict.items()}


def head(prefix: str) -> dict[str, Tensor]:
    return {prefix + 'weight': torch.randn(5, 64), prefix + 'bias': torch.randn(5)}


def decoder() -> dict[str, Tensor]:
    return randomised(GreenMIMPretrainDecoder(64, 16, decoder_depth=2, decoder_num_heads=2))


def microsoft_weights(version: int) -> dict[str, Tensor]:
    """timm's Swin under the names of Microsoft's code, which merges after a stage."""
    weights = {}
    for key, value in randomised(timm_swin(version)).state_dict().items():
        parts = key.split('.')
        if parts[2:3] == ['downsample']:
            parts[1] = str(int(parts[1]) - 1)
        weights['.'.join(parts).replace('head.fc', 'head')] = value
    if version == 1:
        for key in [key for key in weights if key.endswith('bias_table')]:
            weights[key.replace('bias_table', 'index')] = relative_position_index(4)
    return weights


def detectron2_weights() -> dict[str, Tensor]:
    weights = microsoft_weights(1)
    weights = {k: v for k, v in weights.items() if not k.startswith('head.')}
    for leaf in ('weight', 'bias'):
        weights[f'norm3.{leaf}'] = weights.pop(f'norm.{leaf}')
        for stage in range(3):
            weights[f'norm{stage}.{leaf}'] = torch.randn(8 << stage)
    return prefixed('backbone.bottom_up.', weights)


def torchvision_weights(version: int) -> dict[str, Tensor]:
    weights = dict(randomised(torchvision_swin(version)).state_dict())
    for key, value in weights.items():
        if version == 2 and key.endswith('qkv.bias'):
            value[len(value) // 3 : 2 * len(value) // 3] = 0
    return weights


@lru_cache
def weights_of(name: str, version: int) -> dict[str, Tensor]:
    """Random weights under the names of a format."""
    torch.manual_seed(len(name) + version)
    last = randomised(green(version, out_indices=(3,))).state_dict()
    if name == 'greenmim_mm':
        return {**prefixed('backbone.', last), **prefixed('neck.', decoder().state_dict())}
    if name == 'mmdet':
        backbone = LIBRARIES['mmdet'](1) if version == 1 else green(2)
        return prefixed('backbone.', randomised(backbone).state_dict())
    if name == 'mmpretrain':
        return {**prefixed('backbone.', last), **head('head.fc.')}
    if name == 'greenmim':
        weights = microsoft_weights(1)
        weights = {k: v for k, v in weights.items() if not k.startswith('head.')}
        return {**prefixed('encoder.', weights), **decoder().state_dict()}
    if name == 'microsoft':
        return microsoft_weights(version)
    if name == 'timm':
        return randomised(timm_swin(version)).state_dict()
    if name == 'huggingface':
        return randomised(huggingface_swin(version, 'classifier')).state_dict()
    if name == 'torchvision':
        return torchvision_weights(version)
    return detectron2_weights()


def assert_equal(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert value.dtype == second[key].dtype
        assert torch.equal(value, second[key]), key


def check_round_trip(source: str, target: str, version: int) -> None:
    weights = weights_of(source, version)
    keys = list(weights)
    # mmdet has no Swin V2 of its own.
    assert detect_format(keys) == ('mmpretrain' if (source, version) == ('mmdet', 2) else source)
    there, report = convert_with_report(weights, source, target)
    assert report.lossless and report.version == version
    accounts = (report.mapped, report.transformed, report.dropped)
    assert sorted(key for account in accounts for key in account) == sorted(keys)
    named = [*report.mapped.values(), *(names for names, _ in report.transformed.values())]
    assert {key for names in named for key in names.split(', ')} | report.added.keys() == set(there)
    # What was written is recognised, if only as a format that names backbones in the same way.
    assert_equal(
        convert_state_dict(there, 'auto', source), convert_state_dict(there, target, source)
    )
    back = convert_state_dict(there, target, source)
    # Buffers can be computed again, unless they depend on a window that nothing tells (V2).
    lost = {k for k, why in report.dropped.items() if version == 2 or 'computed' not in why}
    plain = {key.removeprefix('swin.').removeprefix('swinv2.'): v for key, v in back.items()}
    kept = {key: value for key, value in weights.items() if key not in lost}
    assert_equal(
        plain, {key.removeprefix('swin.').removeprefix('swinv2.'): v for key, v in kept.items()}
    )


@pytest.mark.parametrize('target', CASES_V1)
@pytest.mark.parametrize('source', CASES_V1)
def test_round_trip_v1(source, target):
    check_round_trip(source, target, 1)


@pytest.mark.parametrize('target', CASES_V2)
@pytest.mark.parametrize('source', CASES_V2)
def test_round_trip_v2(source, target):
    check_round_trip(source, target, 2)


@pytest.mark.parametrize('name', CASES_V1)
def test_same_format_is_left_alone(name):
    weights = weights_of(name, 1)
    same, report = convert_with_report(weights, name, name)
    assert_equal(same, weights)
    assert report.mapped == {key: key for key in weights}
    assert not any([report.transformed, report.dropped, report.added, report.lost])
    assert all(same[key] is weights[key] for key in weights)


LIBRARY_CASES = [
    *(
        (name, version)
        for name in LIBRARIES
        for version in (1, 2)
        if (name, version) != ('mmdet', 2)
    ),
    ('huggingface-backbone', 1),
]


INNER_NORMS = [f'backbone.norm{stage}' for stage in range(3)]


def library_model(name: str, version: int) -> nn.Module:
    torch.manual_seed(3)
    if name == 'huggingface-backbone':
        return randomised(huggingface_swin(1, 'backbone'))
    return randomised(LIBRARIES[name](version))


def compare(backbone: nn.Module, model: nn.Module, side: int = 256) -> None:
    """Stage outputs in fp32; stages of the library without a norm get the backbone's."""
    images = torch.randn(2, 3, side, side)
    ours, theirs = stage_maps(backbone, images), stage_maps(model, images)
    assert len(ours) == len(theirs) == 4
    for stage, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        if not isinstance(model, OWN_NORMS) and stage < 3:
            norm = getattr(backbone, f'norm{stage}')
            other = norm(other.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        assert own.std() > 0.05
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('name', 'version'), LIBRARY_CASES)
def test_from_library_gives_the_same_features(name, version):
    model = library_model(name, version)
    converted, report = convert_with_report(model.state_dict(), name.split('-')[0], 'greenmim_mm')
    assert report.lossless
    backbone = randomised(green(version))
    result = backbone.load_state_dict(
        {k.removeprefix('backbone.'): v for k, v in converted.items() if k[:5] != 'head.'},
        strict=False,
    )
    norms = [f'norm{s}.{p}' for s in range(3) for p in ('weight', 'bias')]
    missing = [key for key in result.missing_keys if not key.endswith(('_index', '_table'))]
    assert missing == ([] if isinstance(model, OWN_NORMS) else norms)
    assert result.unexpected_keys == []
    with torch.no_grad():
        compare(backbone, model)


@pytest.mark.parametrize(('name', 'version'), LIBRARY_CASES)
def test_into_library_gives_the_same_features(name, version):
    model = library_model(name, version)
    backbone = randomised(green(version, out_indices=(0, 1, 2, 3)))
    weights = prefixed('backbone.', backbone.state_dict())
    if name == 'huggingface':  # A norm per stage would make it a SwinBackbone.
        weights = {k: v for k, v in weights.items() if k[:14] not in INNER_NORMS}
    converted, report = convert_with_report(weights, 'greenmim_mm', name.split('-')[0])
    converted = {k.removeprefix('backbone.'): v for k, v in converted.items()}
    # Strict but for what the report calls missing.
    result = model.load_state_dict(converted, strict=False)
    assert result.unexpected_keys == []
    missing = {key for key in result.missing_keys if not key.endswith(('_index', 'coords_table'))}
    assert missing == report.missing.keys()
    with torch.no_grad():
        compare(backbone, model)


@pytest.mark.parametrize('version', [1, 2])
def test_windows_that_timm_shrinks(version):
    """Each stage may have a window of its own: timm's is never larger than the map."""
    model = randomised(timm_swin(version, window_size=8, img_size=128))
    windows = (8, 8, 8, 4)
    converted = convert_state_dict(model.state_dict(), 'timm', 'greenmim_mm', windows)
    backbone = randomised(green(version, window_size=windows))
    weights = {k.removeprefix('backbone.'): v for k, v in converted.items() if k[:5] != 'head.'}
    backbone.load_state_dict(weights, strict=False)
    compare(backbone, model, side=128)
    table = 'backbone.stages.3.blocks.0.attn.w_msa.relative_position_bias_table'
    if version == 1:
        kept = convert_state_dict(model.state_dict(), 'timm', 'greenmim_mm')
        assert torch.equal(kept[table], converted[table]) and len(kept[table]) == 49
        resized = convert_state_dict(model.state_dict(), 'timm', 'greenmim_mm', 8)
        assert len(resized[table]) == 225
