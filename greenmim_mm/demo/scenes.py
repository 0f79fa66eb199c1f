"""Scenes of the demo: large digits in chalk or ink on calm backgrounds, with nothing downloaded.

The digits are those bundled with scikit-learn (1797 scans of 8x8), the backgrounds small pieces of
photographs that lie in the scikit-image wheel. Both are real images; only their composition is
artificial. A digit spans two to three mask units of 32 pixels, so that there is a shape to
continue where a unit is hidden, and backgrounds are calm, so that shapes are there to be learnt.
Half of the images are light on dark, half dark on light: what a pixel is worth depends on the
rest of the image, so that the digits cannot be told by where it is light.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata, resources

import cv2
import numpy as np

PHOTOGRAPHS = {
    'train': ('astronaut.png', 'camera.png', 'grass.png', 'hubble_deep_field.jpg', 'rocket.jpg'),
    'dev': ('brick.png', 'coffee.png'),
    'val': ('chelsea.png', 'coins.png', 'gravel.png'),
}
"""Photographs a split, by file name in ``skimage/data``.

Listed by hand: they are part of the wheel (much of ``skimage.data`` is downloaded on first use),
show no large numerals, are no microscopy or drawings, and scikit-image says of each of them that
it is CC0, in the public domain or without known restriction.
"""

DIGITS = {'train': slice(0, 1157), 'dev': slice(1157, 1415), 'val': slice(1415, None)}
"""Samples of ``load_digits`` a split.

The labels of that file repeat the text of one form about every 130 samples, and 1157 and 1415 begin
such a repeat. Cutting there rather than at random keeps the handwriting of a form in one split.
"""

DIGIT_HEIGHT = (0.42, 0.72)
"""Range of the digits' height, relative to the image's side: 54 to 92 of 128 pixels."""

DIGITS_PER_IMAGE = (1, 3)
MAX_ROTATION = 15.0  # degrees; more would make a 6 and a 9, a 1 and a 7 ambiguous

BACKGROUND_SIDE = (0.15, 0.4)
"""Range of a background's side, relative to the photograph's smaller one."""

BACKGROUND_BLUR = 0.06
"""Standard deviation of the blur over a background, relative to its side."""

BACKGROUND_CONTRAST = 0.04
"""Standard deviation of a background's brightness within an image."""

CHALK = ((0.1, 0.35), (0.85, 1.0))
INK = ((0.65, 0.9), (0.0, 0.15))
"""Ranges of the brightness of a background and of the digits on it."""

TINT = 0.06
"""How far the channels of an image may be from grey: shapes tell the digits, not colours."""

GAP = 1 / 64
"""Least distance between digits, relative to the image's side."""


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
        The samples of each split, by its name in ``DIGITS``.

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
    return {
        name: DigitPool(glyphs[part], data.target[part].astype(np.int64), indices[part])
        for name, part in DIGITS.items()
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


def random_background(
    rng: np.random.Generator, photo: np.ndarray, image_size: int, brightness: float
) -> np.ndarray:
    """Cuts a small piece out of a photograph, blurs and enlarges it and takes most contrast away.

    Args:
        rng: Source of the square's place and size and the mirroring.
        photo: RGB, uint8, ``(H, W, 3)``.
        image_size: Side of the result, ``S``.
        brightness: Its mean, in ``[0, 1]``.

    Returns:
        Brightness about ``[0, 1]``, float32, ``(S, S)``.
    """
    height, width = photo.shape[:2]
    side = round(min(height, width) * rng.uniform(*BACKGROUND_SIDE))
    top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
    piece = photo[top : top + side, left : left + side].mean(axis=2, dtype=np.float32)
    if rng.random() < 0.5:
        piece = np.ascontiguousarray(piece[:, ::-1])
    piece = cv2.GaussianBlur(piece, (0, 0), BACKGROUND_BLUR * side)
    # INTER_AREA averages when shrinking but degrades to blocks when enlarging.
    interpolation = cv2.INTER_AREA if side > image_size else cv2.INTER_CUBIC
    piece = cv2.resize(piece, (image_size, image_size), interpolation=interpolation)
    # A piece of a night sky is flat: its noise is not to be blown up.
    contrast = BACKGROUND_CONTRAST / max(float(piece.std()), 1.0)
    return brightness + contrast * (piece - piece.mean())


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


def compose_scene(
    rng: np.random.Generator, digits: DigitPool, photo: np.ndarray, image_size: int
) -> tuple[np.ndarray, list[Instance]]:
    """Composes random digits over a calm background.

    Digits lie wholly inside the image and do not touch; one for which no place is found is left
    out.

    Args:
        rng: Source of all choices.
        digits: Samples to draw from.
        photo: RGB, uint8, ``(H, W, 3)``.
        image_size: Side of the image in pixels, ``S``.

    Returns:
        The image in RGB, uint8, ``(S, S, 3)``, and its instances. Their masks do not overlap and
        hold the pixels where the digit's opacity exceeds 0.5.
    """
    ground, figure = CHALK if rng.random() < 0.5 else INK
    canvas = random_background(rng, photo, image_size, rng.uniform(*ground))
    gap = max(2, round(GAP * image_size))
    taken = np.zeros((image_size, image_size), dtype=bool)
    instances = []
    for _ in range(rng.integers(DIGITS_PER_IMAGE[0], DIGITS_PER_IMAGE[1] + 1)):
        sample = int(rng.integers(len(digits.labels)))
        opacity = render_digit(
            digits.glyphs[sample],
            height=image_size * rng.uniform(*DIGIT_HEIGHT),
            angle=rng.uniform(-MAX_ROTATION, MAX_ROTATION),
            stretch=rng.uniform(0.9, 1.15),
        )
        opacity = np.pad(opacity, gap)
        inside = opacity > 0.5
        window = _find_place(rng, taken, _near(inside, gap))
        if window is None:
            continue
        brightness = rng.uniform(*figure)
        canvas[window] += (brightness - canvas[window]) * opacity
        taken[window] |= inside
        mask = np.zeros_like(taken)
        mask[window] = inside
        instances.append(Instance(int(digits.labels[sample]), int(digits.indices[sample]), mask))

    tint = rng.uniform(1 - TINT, 1 + TINT, size=3)
    image = np.rint(np.clip(canvas[..., None] * tint, 0, 1) * 255).astype(np.uint8)
    return image, instances


def _bounds(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and one past the last ``(row, column)`` of a mask, bool, ``(H, W)``, with any True."""
    where = np.argwhere(mask)
    return where.min(axis=0), where.max(axis=0) + 1


def _near(inside: np.ndarray, distance: float) -> np.ndarray:
    """Pixels at most so far from a shape, and the shape; bool, ``(h, w)``."""
    outside = (~inside).astype(np.uint8)
    return cv2.distanceTransform(outside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) <= distance


def _find_place(
    rng: np.random.Generator, taken: np.ndarray, shape: np.ndarray
) -> tuple[slice, slice] | None:
    """Draws a free place.

    Args:
        rng: Source of the place.
        taken: Pixels of the digits that are there, bool, ``(S, S)``.
        shape: Pixels that must be free, bool, ``(h, w)``.

    Returns:
        Rows and columns of the place, or None if fifty draws found none.
    """
    room = np.array(taken.shape) - shape.shape
    if room.min() < 0:
        return None
    for _ in range(50):
        top, left = rng.integers(room + 1).tolist()
        window = slice(top, top + shape.shape[0]), slice(left, left + shape.shape[1])
        if not (taken[window] & shape).any():
            return window
    return None
