"""The study's data: unlabelled images as one array, annotated ones as a COCO data set."""

from pathlib import Path

import cv2
import numpy as np
import torch
from pycocotools.coco import COCO
from torch import Tensor
from tqdm import tqdm

from greenmim_mm.demo.data import DemoDataConfig, build_demo_data, draw_scene
from greenmim_mm.demo.scenes import PHOTOGRAPHS, load_digit_pools, load_photographs

from .design import Study
from .results import Places, working_at

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


def build_data(study: Study, places: Places) -> Path:
    """Make what is not there yet; a few minutes on one core.

    Returns:
        The folder: ``unlabelled.npy`` uint8 ``(N, S, S, 3)`` RGB, and ``labelled/``, demo data.
    """
    folder, settings = places.data(study), study.data
    labelled, unlabelled = folder / 'labelled', folder / 'unlabelled.npy'
    if labelled.exists() and unlabelled.exists():
        return folder
    with working_at(folder):
        if not labelled.exists():
            config = DemoDataConfig(
                settings.image_size,
                num_unlabelled=1,  # those lie in the array
                num_train=settings.num_train,
                num_val=settings.num_val,
                num_dev=settings.num_dev,
                seed=settings.seed,
            )
            build_demo_data(labelled, config)
        if not unlabelled.exists():
            _write_unlabelled(study, unlabelled)
    return folder


def _write_unlabelled(study: Study, path: Path) -> None:
    settings = study.data
    config = DemoDataConfig(settings.image_size, seed=settings.seed)
    pools = load_digit_pools()
    photographs = {split: load_photographs(names) for split, names in PHOTOGRAPHS.items()}
    shape = (settings.num_unlabelled, settings.image_size, settings.image_size, 3)
    temporary = path.with_suffix('.tmp')
    images = np.lib.format.open_memmap(temporary, 'w+', np.uint8, shape)
    for index in tqdm(range(len(images)), desc='unlabelled', unit='image', disable=None):
        images[index] = draw_scene(config, 'unlabelled', index, pools, photographs)[1]
    images.flush()
    temporary.replace(path)


def normalise(images: np.ndarray) -> Tensor:
    """RGB images, uint8 ``(B, H, W, 3)``, as the networks take them: float32 ``(B, 3, H, W)``."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def read_boxes(folder: Path, part: str, count: int) -> tuple[np.ndarray, Tensor, np.ndarray]:
    """The first annotated images of a part.

    Args:
        folder: What :func:`build_data` returned.
        part: 'train', 'dev' or 'val'.
        count: Number of images.

    Returns:
        Images uint8 ``(N, H, W, 3)`` RGB; boxes float32 ``(K, 5)``, number of the image and
        corners ``x1, y1, x2, y2``; the digits in them, int64 ``(K,)``.
    """
    coco = COCO(str(folder / f'labelled/coco/annotations/instances_{part}.json'))
    images, boxes, digits = [], [], []
    for number, entry in enumerate(coco.dataset['images'][:count]):
        pixels = cv2.imread(str(folder / 'labelled/coco' / part / entry['file_name']))
        images.append(pixels[..., ::-1])
        for annotation in coco.imgToAnns[entry['id']]:
            x, y, width, height = annotation['bbox']
            boxes.append((number, x, y, x + width, y + height))
            digits.append(annotation['category_id'] - 1)
    return np.stack(images), torch.tensor(boxes, dtype=torch.float32), np.array(digits)
