"""Stand-in data in the folders where recipes look for the real one."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest


def _image(rng: np.random.Generator, height: int = 80, width: int = 96) -> bytes:
    """A smooth JPEG."""
    small = rng.integers(0, 256, (5, 6, 3), np.uint8)
    return cv2.imencode('.jpg', cv2.resize(small, (width, height)))[1].tobytes()


def write_coco(root: Path, names: tuple[str, str], categories: list[str], pattern: str) -> None:
    """Two parts of a COCO data set, four images each, an object of every fourth class in each."""
    rng = np.random.default_rng(0)
    (root / 'annotations').mkdir(parents=True, exist_ok=True)
    for part in names:
        (root / part).mkdir()
        images, annotations = [], []
        for number in range(1, 5):
            file = f'{number:012d}.jpg'
            (root / part / file).write_bytes(_image(rng))
            images.append(dict(id=number, file_name=file, height=80, width=96))
            annotations.append(
                dict(
                    id=number,
                    image_id=number,
                    category_id=1 + 4 * number % len(categories),
                    iscrowd=0,
                    area=2000,
                    bbox=[10, 12, 50, 40],
                    segmentation=[[10, 12, 60, 12, 60, 52, 10, 52]],
                )
            )
        content = dict(
            images=images,
            annotations=annotations,
            categories=[dict(id=i, name=name) for i, name in enumerate(categories, 1)],
        )
        (root / 'annotations' / pattern.format(part)).write_text(json.dumps(content))


@pytest.fixture(scope='session')
def place(tmp_path_factory):
    """A folder with ``data/`` as the recipes expect it."""
    from mmdet.datasets import CocoDataset

    root = tmp_path_factory.mktemp('place')
    rng = np.random.default_rng(0)
    images = [_image(rng) for _ in range(4)]
    for part in ('train', 'val'):
        for number in range(1000):
            folder = root / 'data/imagenet' / part / f'n{number:08d}'
            folder.mkdir(parents=True)
            (folder / f'{folder.name}_0.JPEG').write_bytes(images[number % 4])
    (root / 'data/images/more').mkdir(parents=True)
    for number, image in enumerate(images):
        (root / 'data/images' / ('more' if number % 2 else '.') / f'{number}.jpg').write_bytes(
            image
        )
    classes = list(CocoDataset.METAINFO['classes'])
    write_coco(root / 'data/coco', ('train2017', 'val2017'), classes, 'instances_{}.json')
    write_coco(root / 'data/custom', ('train', 'val'), ['nut', 'bolt'], 'instances_{}.json')
    for part in ('training', 'validation'):
        ade = root / 'data/ade/ADEChallengeData2016'
        for kind in ('images', 'annotations'):
            (ade / kind / part).mkdir(parents=True)
        for number in range(4):
            (ade / f'images/{part}/{number}.jpg').write_bytes(images[number])
            labels = rng.integers(0, 151, (10, 12), np.uint8)
            labels = cv2.resize(labels, (96, 80), interpolation=cv2.INTER_NEAREST)
            assert cv2.imwrite(str(ade / f'annotations/{part}/{number}.png'), labels)
    return root


@pytest.fixture(autouse=True)
def in_place(place, monkeypatch):
    """Recipes are read and run where their data lies."""
    monkeypatch.chdir(place)
    # They ask compilers for their versions and lay the config out, seconds for each runner.
    monkeypatch.setattr('mmengine.runner.runner.collect_env', dict)
    monkeypatch.setattr('mmengine.config.Config.pretty_text', '')
