"""The one table of architectures against mmpretrain's own."""

import pytest
from mmpretrain.models.backbones import SwinTransformer, SwinTransformerV2

from greenmim_mm.archs import SWIN_ARCHS, SWINV2_ARCHS


def plain(arch: dict) -> dict:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in arch.items()}


@pytest.mark.parametrize(
    ('archs', 'kind'), [(SWIN_ARCHS, SwinTransformer), (SWINV2_ARCHS, SwinTransformerV2)]
)
def test_names_mean_what_they_mean_in_mmpretrain(archs, kind):
    assert archs
    for name, arch in archs.items():
        assert plain(kind.arch_zoo[name]) == arch, name


def test_the_largest_are_v2_alone():
    assert SWINV2_ARCHS.keys() - SWIN_ARCHS.keys() == {'huge', 'giant'}
    assert SWINV2_ARCHS['huge']['num_heads'] == (8, 16, 32, 64)
