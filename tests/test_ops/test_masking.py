"""Masks: counts, reproducibility, and what is refused."""

import numpy as np
import pytest
import torch

from greenmim_mm.ops import UnitMask, as_unit_mask, mask_generator, random_mask, unit_grid


@pytest.mark.parametrize(
    ('num_units', 'ratio', 'visible'),
    [(49, 0.75, 12), (36, 0.75, 9), (10, 0.9, 1), (4, 0.99, 1), (4, 0.01, 3), (2, 0.5, 1)],
)
def test_random_mask_leaves_the_share_visible(num_units, ratio, visible):
    mask = random_mask(num_units, ratio, np.random.default_rng(0))
    assert mask.dtype == np.bool_ and mask.shape == (num_units,)
    assert (~mask).sum() == visible


def test_random_mask_is_uniform():
    """Every unit is visible equally often."""
    rng = np.random.default_rng(0)
    visible = sum(~random_mask(20, 0.75, rng) for _ in range(4000)) / 4000
    np.testing.assert_allclose(visible, 0.25, atol=0.03)


@pytest.mark.parametrize('ratio', [0, 1, -0.1, 1.5, float('nan')])
def test_random_mask_refuses_ratio(ratio):
    with pytest.raises(ValueError, match='mask_ratio=.*between 0 and 1'):
        random_mask(49, ratio, np.random.default_rng(0))


def test_random_mask_refuses_a_single_unit():
    with pytest.raises(ValueError, match='num_units=1.*larger images'):
        random_mask(1, 0.5, np.random.default_rng(0))


def test_generator_depends_on_each_argument():
    def draw(*args):
        return tuple(random_mask(64, 0.5, mask_generator(*args)))

    assert draw(1, 2, 3, 4) == draw(1, 2, 3, 4)
    variants = [draw(*args) for args in ((1, 2, 3), (0, 2, 3), (1, 0, 3), (1, 2, 0), (1, 2, 3, 1))]
    assert len(set(variants)) == 5


def test_unit_grid():
    assert unit_grid(224, 320) == (7, 10)


@pytest.mark.parametrize('size', [(225, 224), (224, 16), (0, 32), (100, 100)])
def test_unit_grid_refuses_other_sizes(size):
    with pytest.raises(ValueError, match=f'{size[0]}x{size[1]}.*multiples of 32'):
        unit_grid(*size)


def test_as_unit_mask_accepts_all_forms():
    flat = np.array([True, False, True, False, True, True])
    for mask in (
        flat,
        flat[None],
        np.repeat(flat[None], 4, axis=0),
        torch.from_numpy(flat),
        torch.from_numpy(flat)[None].expand(4, -1),
    ):
        found = as_unit_mask(mask, (2, 3), 4)
        assert found.grid == (2, 3)
        np.testing.assert_array_equal(found.hidden, flat)
        np.testing.assert_array_equal(found.visible_units, [1, 3])
        np.testing.assert_array_equal(found.hidden_units, [0, 2, 4, 5])
        assert as_unit_mask(found, (2, 3), 4) is found


@pytest.mark.parametrize(
    ('mask', 'error', 'message'),
    [
        (torch.zeros(6), TypeError, 'bool.*float32'),
        (np.zeros(6, dtype=np.uint8), TypeError, 'bool.*uint8'),
        ([True] * 6, TypeError, 'bool.*list'),
        (torch.zeros(5, dtype=torch.bool), ValueError, r'\(5,\).*2 x 3'),
        (torch.zeros(2, 3, 1, dtype=torch.bool), ValueError, r'\(2, 3, 1\)'),
        (torch.zeros(3, 6, dtype=torch.bool), ValueError, '3 rows for a batch of 4'),
        (torch.zeros(0, 6, dtype=torch.bool), ValueError, '0 rows'),
        (torch.ones(6, dtype=torch.bool), ValueError, 'hides all 6 units'),
        (torch.eye(4, 6).bool(), ValueError, 'rows of mask differ'),
    ],
)
def test_as_unit_mask_refuses(mask, error, message):
    with pytest.raises(error, match=message):
        as_unit_mask(mask, (2, 3), 4)


def test_a_mask_for_another_grid_is_refused():
    mask = UnitMask((2, 3), np.arange(6) > 2)
    with pytest.raises(ValueError, match='for 2 x 3 mask units, the image has 3 x 2'):
        as_unit_mask(mask, (3, 2))
