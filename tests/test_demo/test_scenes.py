import sys

import cv2
import numpy as np
import pytest

from greenmim_mm.demo import scenes


def test_every_digit_and_photograph_may_be_drawn():
    for pool in scenes.load_digit_pools().values():
        assert set(pool.labels.tolist()) == set(range(10))
    for names in scenes.PHOTOGRAPHS.values():
        for photo in scenes.load_photographs(names).values():
            assert photo.dtype == np.uint8 and photo.ndim == 3 and photo.shape[2] == 3


def test_photograph_that_is_not_installed_is_named():
    with pytest.raises(FileNotFoundError, match='nebula.png.*pip install'):
        scenes.load_photographs(['nebula.png'])


def test_missing_digits_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    with pytest.raises(ImportError, match='pip install scikit-learn'):
        scenes.load_digit_pools()


def test_masks_lie_where_the_image_shows_the_digit():
    pool = scenes.load_digit_pools()['train']
    photo = scenes.load_photographs(['grass.png'])['grass.png']
    for seed in range(10):
        image, instances = scenes.compose_scene(np.random.default_rng(seed), pool, photo, 192)
        for instance in instances:
            # A digit has one colour, save for the soft pixel at its outline.
            inner = cv2.erode(instance.mask.astype(np.uint8), np.ones((5, 5))) > 0
            colour = np.median(image[instance.mask], axis=0)
            same = np.abs(image - colour).max(axis=-1) <= 2
            assert same[inner].mean() > 0.95
            outside = cv2.dilate(instance.mask.astype(np.uint8), np.ones((5, 5))) == 0
            assert same[outside].mean() < 0.01
        for position, one in enumerate(instances):
            around = cv2.dilate(one.mask.astype(np.uint8), np.ones((3, 3))) > 0
            for other in instances[:position]:
                assert not (other.mask & around).any()


def test_digits_contrast_with_their_surroundings():
    pool, photos = scenes.load_digit_pools()['train'], scenes.PHOTOGRAPHS['train']
    contrasts = []
    for seed, photo in enumerate(scenes.load_photographs(photos).values()):
        image, instances = scenes.compose_scene(np.random.default_rng(seed), pool, photo, 192)
        lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2Lab)
        background = ~np.any([instance.mask for instance in instances], axis=0)
        for instance in instances:
            near = cv2.dilate(instance.mask.astype(np.uint8), np.ones((25, 25))) > 0
            around = lab[near & background].mean(axis=0)
            contrasts.append(np.linalg.norm(lab[instance.mask].mean(axis=0) - around))
    assert min(contrasts) > 20 and np.mean(contrasts) > 50  # 2 is about just noticeable


def test_half_of_the_images_are_light_on_dark():
    """Where it is light says nothing about the digit: a linear reader of pixels must fail."""
    pool = scenes.load_digit_pools()['train']
    photo = scenes.load_photographs(['coffee.png'])['coffee.png']
    lighter = []
    for seed in range(60):
        image, instances = scenes.compose_scene(np.random.default_rng(seed), pool, photo, 96)
        digits = np.any([instance.mask for instance in instances], axis=0)
        difference = image[digits].mean() - image[~digits].mean()
        assert abs(difference) > 100  # of 255
        lighter.append(difference > 0)
    assert 20 < sum(lighter) < 40


@pytest.mark.parametrize('height', [14, 28, 72, 150])
@pytest.mark.parametrize('angle', [-15, 0, 15])
def test_rendered_digit_has_its_height_and_is_crisp(height, angle):
    pool = scenes.load_digit_pools()['train']
    for glyph in pool.glyphs[:20]:
        opacity = scenes.render_digit(glyph, height, angle, 1.0)
        assert opacity.dtype == np.float32 and 0 <= opacity.min() <= opacity.max() <= 1
        inside = opacity > 0.5
        assert all(side.any() for side in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
        if angle == 0:
            assert abs(opacity.shape[0] - height) <= 1 + height / 64  # a pixel of the field
        edge = (opacity > 0.1) & (opacity < 0.9)
        outline = inside & (cv2.erode(inside.astype(np.uint8), np.ones((3, 3))) == 0)
        assert edge.sum() < 2.5 * outline.sum()


def test_backgrounds_are_calm_and_digits_span_units():
    """What the scenes are for: shapes, not texture, are what there is to learn."""
    pool = scenes.load_digit_pools()['train']
    steps, heights = [], []
    for name, photo in scenes.load_photographs(scenes.PHOTOGRAPHS['train']).items():
        rng = np.random.default_rng(len(name))
        background = scenes.random_background(rng, photo, 128, 0.5)
        assert background.dtype == np.float32 and background.shape == (128, 128)
        assert abs(background.mean() - 0.5) < 1e-3 and background.std() < 0.041
        steps.append(np.abs(np.diff(background, axis=0)).mean())
        _, instances = scenes.compose_scene(rng, pool, photo, 128)
        heights += [np.ptp(np.nonzero(instance.mask)[0]) + 1 for instance in instances]
    assert max(steps) < 0.02
    assert min(heights) > 32 and max(heights) <= 128
