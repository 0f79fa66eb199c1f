"""What holds for every size of images, and for every wrong type in a config."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from greenmim_mm.models import GreenMIMPretrainDecoder, GreenSwin, GreenSwinV2
from greenmim_mm.ops import random_mask, unit_grid
from greenmim_mm.registry import MODELS

ARCH = dict(embed_dims=4, depths=(1, 2, 1, 1), num_heads=(1, 1, 2, 2))
BACKBONE = dict(
    arch=ARCH,
    img_size=64,
    in_channels=3,
    window_size=2,
    mlp_ratio=2.0,
    qkv_bias=True,
    drop_path_rate=0.1,
    out_indices=(3,),
    pad_small_map=False,
    frozen_stages=-1,
    norm_eval=False,
    with_cp=False,
    sequential_groups=None,
    norm_cfg=None,
)
DECODER = dict(
    embed_dim=32,
    decoder_embed_dim=16,
    decoder_depth=1,
    decoder_num_heads=2,
    mlp_ratio=2.0,
    patch_size=32,
    in_channels=3,
    norm_cfg=None,
)
# Larger ones are networks that no machine holds.
NUMBERS = st.floats(-4, 8) | st.sampled_from([float('nan'), float('inf'), -float('inf')])
# What comes out of a config in which something was quoted, left out, nested or misread.
WRONG = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 5), NUMBERS, st.text(max_size=3),
    st.lists(st.none() | st.text(max_size=2) | st.integers(-2, 3) | NUMBERS, max_size=5),
    st.dictionaries(st.sampled_from(['type', 'eps', 'x']), st.none() | st.text(max_size=2)),
)  # fmt: skip


def built_or_refused(kind: str, config: dict, name: str) -> None:
    """A model is built, or the message names the argument that it cannot be built with."""
    try:
        MODELS.build(dict(type=f'greenmim_mm.{kind}', **config))
    except (TypeError, ValueError) as error:
        assert name in str(error), str(error)


@given(st.sampled_from(['GreenSwin', 'GreenSwinV2']), st.sampled_from(sorted(BACKBONE)), WRONG)
def test_backbone_with_any_value(kind, name, value):
    built_or_refused(kind, {**BACKBONE, name: value}, name)


@given(st.sampled_from(sorted(ARCH)), WRONG)
def test_architecture_with_any_value(name, value):
    built_or_refused('GreenSwin', {**BACKBONE, 'arch': {**ARCH, name: value}}, name)


@given(st.sampled_from(sorted(DECODER)), WRONG)
def test_decoder_with_any_value(name, value):
    built_or_refused('GreenMIMPretrainDecoder', {**DECODER, name: value}, name)


@pytest.mark.parametrize(
    'name, value',
    [
        ('drop_path_rate', '0.1'), ('mlp_ratio', '4'), ('qkv_bias', 1), ('frozen_stages', '1'),
        ('out_indices', 3), ('out_indices', ['3']), ('sequential_groups', 2.0),
        ('in_channels', 3.0),
    ],
)  # fmt: skip
def test_wrong_types_are_refused(name, value):
    with pytest.raises(TypeError, match=name):
        GreenSwin(**{**BACKBONE, name: value})


NETWORKS = [
    cls(**{**BACKBONE, 'drop_path_rate': 0.0, 'pad_small_map': True}).double().eval()
    for cls in (GreenSwin, GreenSwinV2)
]


@given(st.sampled_from(NETWORKS), st.integers(1, 100), st.integers(1, 100), st.integers(1, 2))
def test_images_of_any_size(network, height, width, batch):
    with torch.no_grad():
        (out,) = network(torch.rand(batch, 3, height, width, dtype=torch.float64))
    # Embedding and each merging round up.
    rows, columns = ((side + 31) // 32 for side in (height, width))
    assert out.shape == (batch, 32, rows, columns) and out.isfinite().all()


@given(
    st.sampled_from(NETWORKS), st.integers(1, 3), st.integers(2, 3), st.integers(0, 99),
    st.floats(0.01, 0.99),
)  # fmt: skip
def test_hidden_pixels_have_no_influence(network, rows, columns, seed, ratio):
    generator = torch.Generator().manual_seed(seed)
    size = (1, 3, 32 * rows, 32 * columns)
    images, others = (torch.rand(size, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = random_mask(rows * columns, ratio, np.random.default_rng(seed))
    assert unit_grid(*size[2:]) == (rows, columns)
    hidden = torch.from_numpy(mask).reshape(rows, columns)
    pixels = hidden.repeat_interleave(32, 0).repeat_interleave(32, 1)
    with torch.no_grad():
        first = network(images, mask)
        second = network(torch.where(pixels, others, images), mask)
    assert torch.equal(first, second) and first.shape[1] == (~mask).sum()


@given(st.integers(1, 3), st.integers(2, 3), st.integers(0, 99), st.floats(0.01, 0.99))
def test_decoder_paints_every_unit(rows, columns, seed, ratio):
    mask = random_mask(rows * columns, ratio, np.random.default_rng(seed))
    decoder = GreenMIMPretrainDecoder(**DECODER)
    with torch.no_grad():
        out = decoder(torch.rand(2, int((~mask).sum()), 32), mask, (rows, columns))
    assert out.shape == (2, rows * columns, 3 * 32**2)
