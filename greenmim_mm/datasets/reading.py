"""Image files of any kind as BGR arrays, in bounded memory, or an error that says why not."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import cv2
import numpy as np
from PIL import Image, ImageOps

# What Pillow may try: other formats start programs (EPS) or are no photographs.
_FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'DIB', 'TIFF', 'GIF', 'PPM')
MAX_PIXELS = 64_000_000
_ORIENTATION = 0x0112  # EXIF
_QUARTER_TURNS = (5, 6, 7, 8)


class UnreadableImageError(ValueError):
    """An image file is missing, empty, damaged or too large; the message names it."""


def read_image(source: str | IO[bytes], max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image, whatever its name says that it is.

    Rotation by EXIF is applied, transparent pixels are white, 16-bit and float images (0 to 1)
    are brought to 8 bits over their type's whole range, and of several frames the first is taken.
    A baseline JPEG of more than ``max_pixels`` is decoded at a half, a quarter or an eighth.

    Args:
        source: Path, or an open file.
        max_pixels: Most pixels that are decoded.

    Returns:
        ``(H, W, 3)`` uint8, BGR.

    Raises:
        ValueError: If the image has more pixels, or values that no range is known for.
        OSError: If it is no image, or cut off.
    """
    with opened(source) as image:
        # Many times as fast as turning an array's channels around.
        return cv2.cvtColor(decode(image, max_pixels), cv2.COLOR_RGB2BGR)


@contextmanager
def opened(source: str | IO[bytes]) -> Iterator[Image.Image]:
    """An image of which the header alone has been read.

    Raises:
        OSError: If it is no image.
    """
    with _limits_are_ours(), Image.open(source, formats=_FORMATS) as image:
        yield image


def oriented_size(image: Image.Image) -> tuple[int, int]:
    """Height and width of what :func:`decode` returns at full size, from the header."""
    turned = image.getexif().get(_ORIENTATION) in _QUARTER_TURNS
    return image.size if turned else image.size[::-1]


def decode(image: Image.Image, max_pixels: int = MAX_PIXELS, divisor: int = 1) -> np.ndarray:
    """Decode an opened image, as :func:`read_image` describes it.

    Args:
        image: From :func:`opened`.
        max_pixels: Most pixels that are decoded.
        divisor: 1, 2, 4 or 8: by which a JPEG's sides are divided while it is decoded, which is
            faster; others ignore it.

    Returns:
        ``(H, W, 3)`` uint8, RGB.

    Raises:
        ValueError, OSError: As :func:`read_image`.
    """
    _fit(image, max_pixels, divisor)
    image.load()
    # The JPEG decoder has turned to RGB what it could; orientation is in the header.
    ImageOps.exif_transpose(image, in_place=True)
    return np.asarray(_to_rgb(image))


def _fit(image: Image.Image, max_pixels: int, divisor: int) -> None:
    """Ask the decoder for a smaller image if need be, before any memory is taken."""
    width, height = image.size
    jpeg = image.format in ('JPEG', 'MPO')
    # A progressive JPEG holds all of its coefficients, at any scale.
    whole = not jpeg or image.info.get('progressive')
    if jpeg:
        while not whole and width * height > max_pixels * divisor**2 and divisor < 8:
            divisor *= 2
        if divisor > 1:  # once: a second call would count from what the first one left
            image.draft(None, (max(1, width // divisor), max(1, height // divisor)))
    if (width * height if whole else image.width * image.height) > max_pixels:
        raise ValueError(
            f'{width} x {height} pixels are more than the {max_pixels} that are decoded '
            '(max_pixels)'
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode.startswith('I') or mode == 'F':
        return Image.fromarray(_to_8_bits(np.asarray(image), mode)).convert('RGB')
    if mode in ('LA', 'La', 'PA', 'RGBA', 'RGBa') or 'transparency' in image.info:
        image = image.convert('RGBA')
        white = Image.new('RGBA', image.size, 'white')
        return Image.alpha_composite(white, image).convert('RGB')
    return image if mode == 'RGB' else image.convert('RGB')


def _to_8_bits(pixels: np.ndarray, mode: str) -> np.ndarray:
    if mode == 'F':
        low, high = float(pixels.min()), float(pixels.max())
        # NaN fails this, too.
        if not 0 <= low <= high <= 1:
            raise ValueError(f'float values from {low:g} to {high:g} are not between 0 and 1')
        return np.round(pixels * 255).astype(np.uint8)
    if pixels.min() < 0 or pixels.max() > 0xFFFF:
        raise ValueError(f'integers from {pixels.min()} to {pixels.max()} do not fit into 16 bits')
    return (pixels >> 8).astype(np.uint8)


@contextmanager
def _limits_are_ours() -> Iterator[None]:
    """Without Pillow's limit of pixels: it refuses what can be decoded at a smaller scale."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            # Of broken metadata, once for each image.
            warnings.simplefilter('ignore')
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit
