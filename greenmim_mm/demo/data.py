"""Builds the demo's data: the scenes of :mod:`.scenes` as a folder.

The layout is the one that the pre-training and the detection configs expect::

    DST/unlabelled/*.jpg                       images for pre-training
    DST/coco/train/*.jpg                       images of the COCO instance data set
    DST/coco/val/*.jpg
    DST/coco/dev/*.jpg                         if asked for
    DST/coco/annotations/instances_train.json  ten categories "0".."9", ids 1..10
    DST/coco/annotations/instances_val.json
    DST/coco/annotations/instances_dev.json
    DST/meta.json                              how it was made, written last

``unlabelled`` and ``train`` draw from the same digits and photographs. ``dev``, for choices, and
``val``, for reports, share neither a digit sample nor a photograph with them or with each other,
for any two seeds: the split is fixed, only the composition is drawn.
"""

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from tqdm import tqdm

from .scenes import (
    PHOTOGRAPHS,
    DigitPool,
    Instance,
    compose_scene,
    load_digit_pools,
    load_photographs,
)

logger = logging.getLogger(__name__)

PARTS = ('unlabelled', 'train', 'val', 'dev')
"""The parts of the data; the position is the part's key in the seed sequence, so do not reorder."""

SPLITS = {'unlabelled': 'train', 'train': 'train', 'val': 'val', 'dev': 'dev'}
"""The split of digits and photographs that a part draws from."""

JPEG_QUALITY = 95

_PHOTOGRAPH_LICENSE = {
    'id': 1,
    'name': 'Photographs: CC0 or public domain, see the docstrings of skimage.data; '
    'digits: CC BY 4.0, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository',
    'url': 'https://archive.ics.uci.edu/dataset/80',
}


@dataclass(frozen=True)
class DemoDataConfig:
    """What to build.

    Args:
        image_size: Side of the square images in pixels, a multiple of 32 and at least 96.
        num_unlabelled: Number of images for pre-training, at least 1.
        num_train: Number of annotated training images, at least 1.
        num_val: Number of annotated validation images, at least 1.
        seed: Seed of the composition, at least 0. Image ``i`` of a part depends on the seed, the
            part, ``i`` and ``image_size`` only, so a larger build begins with the smaller one.
        num_dev: Number of annotated images for choices; 0 leaves the part out.

    Raises:
        TypeError: An argument is not an ``int``.
        ValueError: An argument is out of its range.
    """

    image_size: int = 128
    num_unlabelled: int = 2000
    num_train: int = 600
    num_val: int = 150
    seed: int = 0
    num_dev: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f'{name} must be an int, got {value!r}; pass a whole number')
        if self.image_size < 96 or self.image_size % 32:
            raise ValueError(
                f'image_size must be a multiple of 32 and at least 96, got {self.image_size}; '
                f'use for example {max(96, round(self.image_size / 32) * 32)}'
            )
        for name in ('num_unlabelled', 'num_train', 'num_val'):
            if getattr(self, name) < 1:
                raise ValueError(
                    f'{name} must be at least 1, got {getattr(self, name)}; '
                    'ask for one image or more'
                )
        for name in ('num_dev', 'seed'):
            if getattr(self, name) < 0:
                raise ValueError(
                    f'{name} must be at least 0, got {getattr(self, name)}; use for example 0'
                )


@dataclass(frozen=True)
class DemoDataSummary:
    """What was built.

    Args:
        path: The folder.
        num_images: Number of images a part, by the names in ``PARTS``.
        num_instances: Number of digits a part; those of ``unlabelled`` are not written down.
        photographs: File names of the photographs used, a part.
    """

    path: Path
    num_images: dict[str, int]
    num_instances: dict[str, int]
    photographs: dict[str, list[str]]


def build_demo_data(
    dst: str | Path, config: DemoDataConfig | None = None, *, overwrite: bool = False
) -> DemoDataSummary:
    """Builds the demo's data (layout in the module's docstring).

    The same config gives the same bytes. The data is built beside ``dst`` and renamed at the end,
    so that ``dst`` is either complete or not there.

    Args:
        dst: Folder to make; its parents are made as needed.
        config: What to build, by default ``DemoDataConfig()``.
        overwrite: Replace ``dst`` if it is an earlier build (or empty).

    Returns:
        What was built.

    Raises:
        FileExistsError: ``dst`` exists and ``overwrite`` is off, or ``dst`` is something else than
            demo data.
        FileNotFoundError: The installed scikit-image lacks a photograph.
        ImportError: scikit-learn or scikit-image is not installed.
    """
    config = config or DemoDataConfig()
    dst = Path(dst).resolve()
    _check_destination(dst, overwrite)
    pools = load_digit_pools()
    photographs = {split: load_photographs(names) for split, names in PHOTOGRAPHS.items()}

    dst.parent.mkdir(parents=True, exist_ok=True)
    # The data lies one level below the temporary folder because mkdtemp's own folder is private
    # to its owner, and renaming would keep that.
    with tempfile.TemporaryDirectory(dir=dst.parent, prefix=f'.{dst.name}.') as temporary:
        stage = Path(temporary, 'new')
        stage.mkdir()
        meta = _build_parts(stage, config, pools, photographs)
        _write_json(stage / 'meta.json', meta)
        _check_destination(dst, overwrite)  # building takes a while
        if dst.exists():
            old = Path(temporary, 'old')
            os.rename(dst, old)
            try:
                os.rename(stage, dst)
            except BaseException:
                os.rename(old, dst)
                raise
        else:
            os.rename(stage, dst)

    parts = meta['parts']
    summary = DemoDataSummary(
        path=dst,
        num_images={part: entry['num_images'] for part, entry in parts.items()},
        num_instances={part: entry['num_instances'] for part, entry in parts.items()},
        photographs={part: entry['photographs'] for part, entry in parts.items()},
    )
    logger.info('demo data in %s: images %s', dst, summary.num_images)
    return summary


def draw_scene(
    config: DemoDataConfig,
    part: str,
    index: int,
    pools: Mapping[str, DigitPool],
    photographs: Mapping[str, Mapping[str, np.ndarray]],
) -> tuple[str, np.ndarray, list[Instance]]:
    """Image ``index`` of a part: the name of its photograph, its pixels and its instances.

    Args:
        config: Only ``seed`` and ``image_size`` count.
        part: One of ``PARTS``.
        index: Number of the image, from 0.
        pools: Digit samples by split.
        photographs: Photographs by split and name.
    """
    # One generator an image, so that no image depends on how many others are built.
    seed = np.random.SeedSequence(config.seed, spawn_key=(PARTS.index(part), index))
    rng = np.random.default_rng(seed)
    split = SPLITS[part]
    photograph = PHOTOGRAPHS[split][rng.integers(len(PHOTOGRAPHS[split]))]
    image, instances = compose_scene(
        rng, pools[split], photographs[split][photograph], config.image_size
    )
    return photograph, image, instances


def _build_parts(
    root: Path,
    config: DemoDataConfig,
    pools: Mapping[str, DigitPool],
    photographs: Mapping[str, Mapping[str, np.ndarray]],
) -> dict:
    """Writes all images and annotations below ``root`` and returns the contents of meta.json."""
    counts = {part: getattr(config, f'num_{part}') for part in PARTS}
    meta = {
        'config': asdict(config),
        'versions': {name: metadata.version(name) for name in ('scikit-learn', 'scikit-image')},
        'parts': {},
    }
    annotations_folder = root / 'coco' / 'annotations'
    annotations_folder.mkdir(parents=True)
    for part, count in counts.items():
        if not count:
            continue
        folder = root / part if part == 'unlabelled' else root / 'coco' / part
        folder.mkdir()
        images, annotations, used_digits = [], [], []
        # disable=None: no bar where the output is no terminal
        for index in tqdm(range(count), desc=part, unit='image', disable=None):
            photograph, image, instances = draw_scene(config, part, index, pools, photographs)
            file_name = f'{index + 1:06d}.jpg'
            _write_jpeg(folder / file_name, image)
            images.append(
                {
                    'id': index + 1,
                    'file_name': file_name,
                    'width': config.image_size,
                    'height': config.image_size,
                    'license': _PHOTOGRAPH_LICENSE['id'],
                    'photograph': photograph,
                }
            )
            used_digits += [instance.digit_index for instance in instances]
            if part != 'unlabelled':
                annotations += [
                    _annotation(instance, len(annotations) + position, image_id=index + 1)
                    for position, instance in enumerate(instances, start=1)
                ]
        if part != 'unlabelled':
            _write_json(
                annotations_folder / f'instances_{part}.json', _coco(part, images, annotations)
            )
        meta['parts'][part] = {
            'num_images': count,
            'num_instances': len(used_digits),
            'photographs': sorted({image['photograph'] for image in images}),
            'digit_indices': sorted(set(used_digits)),
        }
    return meta


def _coco(part: str, images: list[dict], annotations: list[dict]) -> dict:
    """The contents of one annotation file, in the layout of COCO 2017."""
    return {
        'info': {
            'description': f'GreenMIM demo, {part}: handwritten digits over photographs',
            'url': 'https://archive.ics.uci.edu/dataset/80',
            'version': '1.0',
            'year': 1998,  # of the digits
            'contributor': 'digits: E. Alpaydin and C. Kaynak; photographs: scikit-image',
            'date_created': '',  # a date would make two builds differ
        },
        'licenses': [_PHOTOGRAPH_LICENSE],
        'images': images,
        'annotations': annotations,
        'categories': [
            {'id': digit + 1, 'name': str(digit), 'supercategory': 'digit'} for digit in range(10)
        ],
    }


def _annotation(instance: Instance, annotation_id: int, image_id: int) -> dict:
    """One COCO annotation; ``digit_index`` is an addition that COCO's readers ignore."""
    rle = coco_mask.encode(np.asfortranarray(instance.mask, dtype=np.uint8))
    return {
        'id': annotation_id,
        'image_id': image_id,
        'category_id': instance.label + 1,
        'bbox': coco_mask.toBbox(rle).tolist(),
        'area': int(coco_mask.area(rle)),
        'iscrowd': 0,
        'segmentation': {'size': rle['size'], 'counts': rle['counts'].decode('ascii')},
        'digit_index': instance.digit_index,
    }


def _check_destination(dst: Path, overwrite: bool) -> None:
    """Raises FileExistsError unless ``dst`` may be made or replaced."""
    if not dst.exists():
        return
    if not overwrite:
        raise FileExistsError(
            f'{dst} exists; give another path, remove it or pass overwrite=True (--overwrite)'
        )
    # Guards against the loss of, say, a home folder given by mistake.
    if not dst.is_dir() or (any(dst.iterdir()) and not (dst / 'meta.json').is_file()):
        raise FileExistsError(
            f'{dst} exists and is no demo data (it has no meta.json), so it is not overwritten; '
            'give another path or remove it'
        )


def _write_jpeg(path: Path, image: np.ndarray) -> None:
    """Writes an RGB image, uint8, ``(H, W, 3)``."""
    # imencode rather than imwrite, which reports a failed write by its return value only
    encoded, data = cv2.imencode(
        '.jpg', cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    )
    assert encoded
    path.write_bytes(data.tobytes())


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value) + '\n', encoding='utf-8')
