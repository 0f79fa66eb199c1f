"""Reading and cropping in one: boxes, pixels, sizes, and what is kept."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler
from mmengine.registry import TRANSFORMS
from PIL import Image

from greenmim_mm.datasets import (
    Draw,
    LoadRandomResizedCrop,
    RepeatableSampler,
    UnlabelledImages,
    UnreadableImageError,
    cropping,
    seeded,
)


def photograph(width: int, height: int) -> Image.Image:
    """Smooth noise of several sizes: as photographs, with edges but without single pixels."""
    rng, total = np.random.default_rng(0), np.zeros((height, width, 3))
    for side in (3, 9, 30):
        noise = rng.uniform(0, 255, (side, side, 3)).astype(np.uint8)
        total += np.asarray(Image.fromarray(noise).resize((width, height), Image.BICUBIC))
    return Image.fromarray((total / 3).astype(np.uint8))


@pytest.fixture
def path(tmp_path):
    photograph(700, 500).save(tmp_path / 'small.jpg', quality=95)
    return str(tmp_path / 'small.jpg')


def crop(transform, path, seed=0):
    with seeded(seed):
        return transform(dict(img_path=path))


def box_of(transform, seed):
    with seeded(seed):
        return transform._draw()[0]


@pytest.mark.parametrize('interpolation', ['bicubic', 'bilinear'])
def test_pixels_are_pillows(path, interpolation):
    """Of the same box, decoded at the same size."""
    transform = LoadRandomResizedCrop(
        96, (0.3, 0.9), interpolation=interpolation, oversampling=math.inf
    )
    method = getattr(Image, interpolation.upper())
    with Image.open(path) as image:
        for seed in range(5):
            found = crop(transform, path, seed)['img']
            top, left, height, width = box_of(transform, seed)
            box = (left, top, left + width, top + height)
            expected = np.asarray(image.crop(box).resize((96, 96), method))[..., ::-1]
            difference = np.abs(found.astype(int) - expected)
            assert difference.max() <= 1 and difference.mean() < 0.1
            assert found.flags.c_contiguous and found.dtype == np.uint8


@pytest.mark.parametrize('oversampling, mean', [(1.0, 4.0), (1.5, 3.0), (math.inf, 0.1)])
def test_large_images_are_read_at_a_smaller_size(tmp_path, monkeypatch, oversampling, mean):
    path = str(tmp_path / 'large.jpg')
    photograph(2000, 1500).save(path, quality=95)
    divisors = []
    monkeypatch.setattr(
        cropping, 'decode', lambda *args: divisors.append(args[2]) or original(*args)
    )
    transform = LoadRandomResizedCrop(64, (0.2, 1.0), oversampling=oversampling)
    with Image.open(path) as image:
        for seed in range(6):
            transform._path = ''
            found = crop(transform, path, seed)
            top, left, height, width = box_of(transform, seed)
            # Not more than was asked for is given up.
            assert min(height, width) / divisors[-1] >= min(64 * oversampling, min(height, width))
            box = (left, top, left + width, top + height)
            expected = np.asarray(image.crop(box).resize((64, 64), Image.BICUBIC))[..., ::-1]
            assert np.abs(found['img'].astype(int) - expected).mean() < mean
            assert (found['img_shape'], found['ori_shape']) == ((64, 64), (1500, 2000))
    assert (set(divisors) == {1}) is (oversampling == math.inf)
    assert max(divisors) == {1.0: 8, 1.5: 8, math.inf: 1}[oversampling]


original = cropping.decode


def test_boxes_have_the_areas_and_shapes_asked_for(path):
    transform = LoadRandomResizedCrop((32, 48), (0.3, 0.5), (0.9, 1.2))
    assert crop(transform, path)['img'].shape == (32, 48, 3)
    for seed in range(50):
        top, left, height, width = box_of(transform, seed)
        assert 0.29 < height * width / (700 * 500) < 0.51 and 0.89 < width / height < 1.21
        assert 0 <= top <= 500 - height and 0 <= left <= 700 - width


def test_turned_upright(tmp_path):
    """The camera's note counts, in the size and in the pixels."""
    path = str(tmp_path / 'turned.jpg')
    image = photograph(400, 200)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif, quality=95)
    transform = LoadRandomResizedCrop((80, 40), (1.0, 1.0), (0.5, 0.5))
    found = crop(transform, path)
    assert found['ori_shape'] == (400, 200)
    expected = np.asarray(image.rotate(-90, expand=True).resize((40, 80), Image.BICUBIC))
    assert np.abs(found['img'][..., ::-1].astype(int) - expected).mean() < 3


@pytest.mark.parametrize('size', [(1, 1), (3, 40), (20, 20)])
@pytest.mark.parametrize('kind', ['png', 'jpg'])
def test_images_smaller_than_the_crop(tmp_path, size, kind):
    path = str(tmp_path / f'tiny.{kind}')
    Image.new('RGB', size, (10, 100, 200)).save(path)
    found = crop(LoadRandomResizedCrop(64), path)['img']
    assert found.shape == (64, 64, 3)
    assert np.abs(found.astype(int) - (200, 100, 10)).max() <= 3


def test_damaged_images_are_named(tmp_path, path):
    transform = LoadRandomResizedCrop(64)
    whole = open(path, 'rb').read()
    cut = tmp_path / 'cut.jpg'
    cut.write_bytes(whole[: len(whole) // 2])
    for _ in range(2):  # it is not remembered as read
        with pytest.raises(UnreadableImageError, match='cut.jpg cannot be read'):
            crop(transform, str(cut))
    with pytest.raises(UnreadableImageError, match='pixels are more than the 1000'):
        crop(LoadRandomResizedCrop(64, max_pixels=1000, oversampling=math.inf), path)


def test_an_image_is_decoded_once_and_nothing_depends_on_it(path, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(cropping, 'decode', lambda *args: calls.append(args) or original(*args))
    transform = LoadRandomResizedCrop(224)
    kept = [crop(transform, path, seed)['img'] for seed in range(4)]
    assert len(calls) == 1
    for seed, image in enumerate(kept):
        assert np.array_equal(crop(LoadRandomResizedCrop(224), path, seed)['img'], image)
    other = str(tmp_path / 'other.png')
    photograph(100, 90).save(other)
    calls.clear()
    crop(transform, other)
    assert np.array_equal(crop(transform, path, 2)['img'], kept[2])
    assert len(calls) == 2


@pytest.mark.parametrize(
    'wrong',
    [
        dict(scale=0),
        dict(crop_ratio_range=(0.0, 1.0)),
        dict(crop_ratio_range=(0.5, 1.5)),
        dict(aspect_ratio_range=(2.0, 1.0)),
        dict(interpolation='nearest'),
        dict(oversampling=0.5),
    ],
)
def test_refuses(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=name):
        TRANSFORMS.build(dict(type='greenmim_mm.LoadRandomResizedCrop') | dict(scale=64) | wrong)


class Numbers:
    """A data set of so many images."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length


@pytest.mark.parametrize('length', [12, 13])
@pytest.mark.parametrize('repeats', [2, 3])
def test_repeats(length, repeats):
    """Crops of an image in a row; all images in so many epochs; as many crops as without."""
    sampler = RepeatableSampler(Numbers(length), seed=3, repeats=repeats)
    seen, draws = Counter(), []
    for epoch in range(repeats):
        sampler.set_epoch(epoch)
        epoch_draws = list(sampler)
        assert len(epoch_draws) == len(sampler) == length
        for first, second in pairwise(epoch_draws):
            assert second.copy == 0 or (int(first), first.copy) == (int(second), second.copy - 1)
        seen.update(map(int, epoch_draws))
        draws += epoch_draws
    assert len(seen) == length
    if length % repeats == 0:
        assert set(seen.values()) == {repeats}
    # No two crops are drawn alike, and the first ones are those of a run without repeats.
    assert len({draw.entropy for draw in draws}) == len(draws)
    assert {Draw(5, 3, 1).entropy, Draw(5, 3, 1, 0).entropy} == {(3, 1, 5)}
    sampler.set_epoch(repeats)
    assert [int(draw) for draw in sampler] != [int(draw) for draw in draws[:length]]
    # The rest of an epoch is that of the whole one.
    sampler.set_epoch(0)
    sampler.start_at(5)
    assert list(sampler) == draws[5:length]


def test_one_repeat_is_no_repeat():
    ours, theirs = RepeatableSampler(Numbers(9), seed=3), DefaultSampler(Numbers(9), seed=3)
    assert list(ours) == list(theirs) and {draw.copy for draw in ours} == {0}


def test_ranks_share_no_image(monkeypatch):
    """The crops of an image are made by one process."""
    seen = []
    for rank in range(2):
        monkeypatch.setattr('mmengine.dataset.sampler.get_dist_info', lambda rank=rank: (rank, 2))
        sampler = RepeatableSampler(Numbers(16), seed=3, repeats=2)
        assert len(sampler) == 8
        seen.append(Counter(map(int, sampler)))
    assert not set(seen[0]) & set(seen[1])
    assert set(seen[0].values()) == set(seen[1].values()) == {2}


@pytest.mark.parametrize('wrong', [0, -1, 1.5, True, '2'])
def test_refuses_repeats(wrong):
    with pytest.raises(ValueError, match='repeats=.*positive whole number'):
        RepeatableSampler(Numbers(4), repeats=wrong)


def test_crops_of_an_image_differ(tmp_path):
    for name in 'ab':
        photograph(80, 60).save(tmp_path / f'{name}.jpg')
    dataset = UnlabelledImages(str(tmp_path), pipeline=[LoadRandomResizedCrop(32, (0.2, 0.4))])
    first, second, third = (dataset[Draw(0, 7, 0, copy)]['img'] for copy in (0, 1, 0))
    assert np.array_equal(first, third) and not np.array_equal(first, second)
    assert torch.equal(torch.from_numpy(dataset[Draw(0, 7, 0, 1)]['img']), torch.from_numpy(second))
