"""Builds the demo's data: handwritten digits over photographs, with nothing downloaded.

The digits are those bundled with scikit-learn (1797 scans of 8x8), the photographs those that lie
in the scikit-image wheel. Both are real images; only their composition is artificial. The result
is a folder in the layout that the pre-training and the detection configs expect::

    DST/unlabelled/*.jpg                       images for pre-training
    DST/coco/train/*.jpg                       images of the COCO instance data set
    DST/coco/val/*.jpg
    DST/coco/annotations/instances_train.json  ten categories "0".."9", ids 1..10
    DST/coco/annotations/instances_val.json
    DST/meta.json                              how it was made, written last

``val`` shares neither a digit sample nor a photograph with ``train`` and ``unlabelled``, for any
two seeds: the split is fixed, only the composition is drawn.
"""

import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata, resources
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from tqdm import tqdm

logger = logging.getLogger(__name__)

PARTS = ('unlabelled', 'train', 'val')
"""The parts of the data; the position is the part's key in the seed sequence, so do not reorder."""

PHOTOGRAPHS = {
    'train': (
        'astronaut.png',
        'brick.png',
        'camera.png',
        'coffee.png',
        'grass.png',
        'hubble_deep_field.jpg',
        'rocket.jpg',
    ),
    'val': ('chelsea.png', 'coins.png', 'gravel.png'),
}
"""Photographs a split, by file name in ``skimage/data``.

Listed by hand: they are part of the wheel (much of ``skimage.data`` is downloaded on first use),
show no large numerals, are no microscopy or drawings, and scikit-image says of each of them that
it is CC0, in the public domain or without known restriction.
"""

VAL_DIGITS_START = 1415
"""Samples of ``load_digits`` from here on are the validation split's.

The labels of that file repeat the text of one form about every 130 samples, and 1415 begins such a
repeat. Cutting there rather than at random keeps the handwriting of a form in one split.
"""

MIN_VISIBLE = 0.5
"""Smallest share of a digit's pixels that later digits leave uncovered.

COCO has instances that show less, but a digit that shows less can often be read as another one.
"""

DIGIT_HEIGHT = (28 / 192, 72 / 192)
"""Range of the digits' height, relative to the image's side."""

DIGITS_PER_IMAGE = (2, 6)
MAX_ROTATION = 15.0  # degrees; more would make a 6 and a 9, a 1 and a 7 ambiguous
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

    Raises:
        TypeError: An argument is not an ``int``.
        ValueError: An argument is out of its range.
    """

    image_size: int = 192
    num_unlabelled: int = 2000
    num_train: int = 600
    num_val: int = 150
    seed: int = 0

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
        if self.seed < 0:
            raise ValueError(f'seed must be at least 0, got {self.seed}; use for example 0')


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


@dataclass(frozen=True)
class DigitPool:
    """Digit samples to draw from.

    Args:
        glyphs: Ink in ``[0, 1]``, float32, ``(N, 8, 8)``.
        labels: The digits 0..9, int64, ``(N,)``.
        indices: Positions in scikit-learn's ``load_digits``, int64, ``(N,)``.
    """

    glyphs: np.ndarray
    labels: np.ndarray
    indices: np.ndarray


@dataclass(frozen=True)
class Instance:
    """One digit of a scene.

    Args:
        label: The digit, 0..9.
        digit_index: Position of its sample in scikit-learn's ``load_digits``.
        mask: Its visible part, bool, ``(S, S)``.
    """

    label: int
    digit_index: int
    mask: np.ndarray


def load_digit_pools() -> dict[str, DigitPool]:
    """Reads scikit-learn's digits.

    Returns:
        The samples of ``"train"`` and of ``"val"``.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the demo's digits need scikit-learn: pip install scikit-learn"
        ) from error
    data = load_digits()
    glyphs = (data.images / 16).astype(np.float32)
    indices = np.arange(len(glyphs))
    splits = {'train': slice(None, VAL_DIGITS_START), 'val': slice(VAL_DIGITS_START, None)}
    return {
        name: DigitPool(glyphs[part], data.target[part].astype(np.int64), indices[part])
        for name, part in splits.items()
    }


def load_photographs(names: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads photographs from the installed scikit-image.

    The files are read directly, since ``skimage.data`` would try to download a missing one.

    Args:
        names: File names in ``skimage/data``.

    Returns:
        By name, the photograph in RGB, uint8, ``(H, W, 3)``; grey ones have equal channels.

    Raises:
        ImportError: scikit-image is not installed.
        FileNotFoundError: The installed scikit-image lacks a photograph.
    """
    try:
        folder = resources.files('skimage') / 'data'
    except ImportError as error:
        raise ImportError(
            "the demo's photographs need scikit-image: pip install scikit-image"
        ) from error
    photographs = {}
    for name in names:
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(
                f'photograph {name!r} is not in the installed scikit-image '
                f'{metadata.version("scikit-image")} ({folder}); install it from its PyPI wheel, '
                'for example pip install scikit-image==0.26.0'
            )
        pixels = cv2.imdecode(np.frombuffer(file.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
        if pixels is None:
            raise FileNotFoundError(f'photograph {file} cannot be decoded; reinstall scikit-image')
        photographs[name] = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    return photographs


def random_crop(rng: np.random.Generator, photo: np.ndarray, image_size: int) -> np.ndarray:
    """Cuts a background out of a photograph.

    Args:
        rng: Source of the square's place and size, the mirroring and the exposure.
        photo: RGB, uint8, ``(H, W, 3)``.
        image_size: Side of the result, ``S``.

    Returns:
        RGB in ``[0, 1]``, float32, ``(S, S, 3)``.
    """
    height, width = photo.shape[:2]
    side = round(min(height, width) * rng.uniform(0.35, 1.0))
    top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
    crop = photo[top : top + side, left : left + side]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    # INTER_AREA averages when shrinking but degrades to blocks when enlarging.
    interpolation = cv2.INTER_AREA if side > image_size else cv2.INTER_CUBIC
    crop = cv2.resize(
        np.ascontiguousarray(crop), (image_size, image_size), interpolation=interpolation
    )
    exposure = rng.uniform(0.7, 1.2) * rng.uniform(0.92, 1.08, size=3)
    return np.clip(crop / 255 * exposure, 0, 1).astype(np.float32)


def render_digit(glyph: np.ndarray, height: float, angle: float, stretch: float) -> np.ndarray:
    """Enlarges an 8x8 digit into a smooth shape with a crisp outline.

    The ink is interpolated as a smooth field and cut at a level. The level rises with the ink
    around it: a fixed one would either fill the small loops of a 6 or a 9, where the scan is grey,
    or tear the thin strokes of a 0, which are no darker.

    Args:
        glyph: Ink in ``[0, 1]``, float32, ``(8, 8)``.
        height: Height of the upright digit in pixels.
        angle: Rotation in degrees, counter-clockwise.
        stretch: Width relative to the sample's own proportions.

    Returns:
        Opacity in ``[0, 1]``, float32, ``(h, w)``, cropped to the digit (opacity above 0.5).
    """
    cell = 8  # pixels of the field a cell of the glyph
    ink = cv2.resize(np.pad(glyph, 2), None, fx=cell, fy=cell, interpolation=cv2.INTER_CUBIC)
    level = 0.18 + 0.6 * cv2.GaussianBlur(ink, (0, 0), 1.2 * cell)
    # The narrow blur rounds off the stairs of the 8x8 grid.
    field = cv2.GaussianBlur(ink, (0, 0), 0.3 * cell) - level
    top_left, bottom_right = _bounds(field > 0)
    extent = bottom_right - top_left  # (rows, columns)

    scale = height / int(extent[0])  # a Python float keeps the field float32
    turn = np.deg2rad(angle)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    matrix = rotation * scale @ np.diag([stretch, 1.0])  # acts on (x, y)
    size = np.ceil(np.abs(matrix) @ extent[::-1]).astype(int) + 4
    centre = (top_left + bottom_right - 1)[::-1] / 2
    shift = (size - 1) / 2 - matrix @ centre
    field = cv2.warpAffine(
        field, np.column_stack([matrix, shift]), tuple(size.tolist()), borderValue=-1
    )

    # The ink rises from 0 to 1 within about one cell, so this slope makes edges of one pixel. The
    # floor keeps empty paper (field <= -0.18) transparent in small digits.
    opacity = np.clip(field * max(cell * scale, 3.0) + 0.5, 0, 1)
    top_left, bottom_right = _bounds(opacity > 0.5)
    return opacity[top_left[0] : bottom_right[0], top_left[1] : bottom_right[1]]


def choose_colour(rng: np.random.Generator, avoid: np.ndarray) -> np.ndarray:
    """Draws a colour that stands out.

    Args:
        rng: Source of the colour.
        avoid: Colours to stay away from, RGB in ``[0, 1]``, float32, ``(N, 3)``.

    Returns:
        RGB in ``[0, 1]``, float32, ``(3,)``: the first of 24 random colours that is far enough
        from all of ``avoid`` in CIELAB, or the farthest where none is.
    """
    hue, saturation = rng.uniform(0, 360, 24), rng.uniform(0.25, 1.0, 24)
    # Mid values look washed out on photographs, so the colours are either bright or dark.
    value = np.where(rng.random(24) < 0.7, rng.uniform(0.85, 1.0, 24), rng.uniform(0.1, 0.4, 24))
    hsv = np.stack([hue, saturation, value], axis=-1).astype(np.float32)
    candidates = cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)
    difference = cv2.cvtColor(candidates, cv2.COLOR_RGB2Lab)[0][:, None] - (
        cv2.cvtColor(np.ascontiguousarray(avoid, dtype=np.float32)[None], cv2.COLOR_RGB2Lab)
    )
    # Shapes are read by lightness; hue alone hardly separates them, hence its smaller weight.
    distance = np.linalg.norm(difference * [1.0, 0.4, 0.4], axis=-1).min(axis=1)
    far = distance > 45
    return candidates[0, far.argmax() if far.any() else distance.argmax()]


def compose_scene(
    rng: np.random.Generator, digits: DigitPool, photo: np.ndarray, image_size: int
) -> tuple[np.ndarray, list[Instance]]:
    """Composes random digits over a random crop of a photograph.

    Digits lie wholly inside the image and may overlap; the pixels of an overlap belong to the
    later digit. A place that would leave an earlier digit less than ``MIN_VISIBLE`` of its pixels
    is drawn again (a digit without an admissible place is left out), so every digit that can be
    seen has its instance.

    Args:
        rng: Source of all choices.
        digits: Samples to draw from.
        photo: RGB, uint8, ``(H, W, 3)``.
        image_size: Side of the image in pixels, ``S``.

    Returns:
        The image in RGB, uint8, ``(S, S, 3)``, and its instances, bottom to top. Their masks do not
        overlap and hold the pixels where the digit's opacity exceeds 0.5.
    """
    canvas = random_crop(rng, photo, image_size)
    rim_width = 1.5 * max(1.0, image_size / 192)
    margin = int(np.ceil(rim_width)) + 1
    owner = np.full((image_size, image_size), -1)  # position in `samples`, -1 for the background
    samples: list[int] = []
    colours: list[np.ndarray] = []
    areas: list[int] = []  # before occlusion

    for _ in range(rng.integers(DIGITS_PER_IMAGE[0], DIGITS_PER_IMAGE[1] + 1)):
        sample = int(rng.integers(len(digits.labels)))
        opacity = render_digit(
            digits.glyphs[sample],
            height=image_size * rng.uniform(*DIGIT_HEIGHT),
            angle=rng.uniform(-MAX_ROTATION, MAX_ROTATION),
            stretch=rng.uniform(0.9, 1.15),
        )
        opacity = np.pad(opacity, margin)
        inside = opacity > 0.5
        rim = _rim(inside, rim_width)
        window = _find_place(rng, owner, areas, covered=np.maximum(opacity, rim) > 0.5)
        if window is None:
            continue

        under, below = canvas[window], owner[window]
        avoid = [under[inside].mean(axis=0)]
        avoid += [colours[i] for i in np.unique(below[(below >= 0) & (rim > 0)])]
        colour = choose_colour(rng, np.stack(avoid))
        luminance = colour @ [0.299, 0.587, 0.114]
        rim_colour = colour * 0.2 if luminance > 0.45 else 1 - (1 - colour) * 0.25
        canvas[window] = _blend(_blend(under, rim_colour, 0.75 * rim), colour, opacity)
        below[rim > 0.5] = -1  # a rim hides what is under it but belongs to no digit
        below[inside] = len(samples)
        samples.append(sample)
        colours.append(colour)
        areas.append(int(inside.sum()))

    image = np.rint(canvas * 255).astype(np.uint8)
    instances = [
        Instance(int(digits.labels[sample]), int(digits.indices[sample]), owner == position)
        for position, sample in enumerate(samples)
    ]
    return image, instances


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
        num_images={part: parts[part]['num_images'] for part in PARTS},
        num_instances={part: parts[part]['num_instances'] for part in PARTS},
        photographs={part: parts[part]['photographs'] for part in PARTS},
    )
    logger.info('demo data in %s: images %s', dst, summary.num_images)
    return summary


def _build_parts(
    root: Path,
    config: DemoDataConfig,
    pools: Mapping[str, DigitPool],
    photographs: Mapping[str, Mapping[str, np.ndarray]],
) -> dict:
    """Writes all images and annotations below ``root`` and returns the contents of meta.json."""
    counts = (config.num_unlabelled, config.num_train, config.num_val)
    meta = {
        'config': asdict(config),
        'versions': {name: metadata.version(name) for name in ('scikit-learn', 'scikit-image')},
        'parts': {},
    }
    annotations_folder = root / 'coco' / 'annotations'
    annotations_folder.mkdir(parents=True)
    for key, (part, count) in enumerate(zip(PARTS, counts, strict=True)):
        split = 'val' if part == 'val' else 'train'
        folder = root / part if part == 'unlabelled' else root / 'coco' / part
        folder.mkdir()
        images, annotations, used_digits = [], [], []
        # disable=None: no bar where the output is no terminal
        for index in tqdm(range(count), desc=part, unit='image', disable=None):
            # One generator an image, so that no image depends on how many others are built.
            seed = np.random.SeedSequence(config.seed, spawn_key=(key, index))
            rng = np.random.default_rng(seed)
            photograph = PHOTOGRAPHS[split][rng.integers(len(PHOTOGRAPHS[split]))]
            image, instances = compose_scene(
                rng, pools[split], photographs[split][photograph], config.image_size
            )
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


def _bounds(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and one past the last ``(row, column)`` of a mask, bool, ``(H, W)``, with any True."""
    where = np.argwhere(mask)
    return where.min(axis=0), where.max(axis=0) + 1


def _rim(inside: np.ndarray, width: float) -> np.ndarray:
    """Opacity of a soft rim around a shape, 1 inside it too; bool to float32, ``(h, w)``."""
    distance = cv2.distanceTransform((~inside).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.clip(width + 0.5 - distance, 0, 1)


def _blend(under: np.ndarray, colour: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """Paints ``colour`` ``(3,)`` over ``under`` ``(h, w, 3)`` with ``opacity`` ``(h, w)``."""
    return under + (colour - under) * opacity[..., None]


def _find_place(
    rng: np.random.Generator, owner: np.ndarray, areas: Sequence[int], covered: np.ndarray
) -> tuple[slice, slice] | None:
    """Draws a place for a digit that leaves enough of the earlier ones to be seen.

    Args:
        rng: Source of the place.
        owner: Position of the digit that a pixel belongs to or -1, int64, ``(S, S)``.
        areas: Pixels of the earlier digits before occlusion.
        covered: Pixels that the new digit would hide, bool, ``(h, w)``.

    Returns:
        Rows and columns of the place, or None if fifty draws found none.
    """
    room = np.array(owner.shape) - covered.shape
    for _ in range(50):
        corner = rng.integers(room + 1)
        if areas and rng.random() < 0.2:
            # Aim near an earlier digit: chance alone makes overlaps rare in a large image.
            rows, columns = np.nonzero(owner == rng.integers(len(areas)))
            target = rng.integers(len(rows))
            corner = np.array([rows[target], columns[target]]) - np.array(covered.shape) // 2
            corner = np.clip(corner + np.rint(rng.normal(0, 0.4, 2) * covered.shape), 0, room)
        top, left = corner.astype(int).tolist()
        window = slice(top, top + covered.shape[0]), slice(left, left + covered.shape[1])
        hidden = owner[window][covered]
        lost = np.bincount(hidden[hidden >= 0], minlength=len(areas))
        seen = np.bincount(owner[owner >= 0], minlength=len(areas))
        if np.all(seen - lost >= MIN_VISIBLE * np.asarray(areas)):
            return window
    return None


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
