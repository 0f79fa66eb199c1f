"""Image files of any kind as BGR arrays, in bounded memory, or an error that says why not."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np
from PIL import Image, ImageOps

# What Pillow may try: other formats start programs (EPS) or are no photographs.
_FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'DIB', 'TIFF', 'GIF', 'PPM')
MAX_PIXELS = 64_000_000


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
    with _limits_are_ours(), Image.open(source, formats=_FORMATS) as image:
        _fit(image, max_pixels)
        image.load()
        # The JPEG decoder has turned to RGB what it could; orientation is in the header.
        image = ImageOps.exif_transpose(image)
        return np.ascontiguousarray(np.asarray(_to_rgb(image))[..., ::-1])


def _fit(image: Image.Image, max_pixels: int) -> None:
    """Ask the decoder for a smaller image if need be, before any memory is taken."""
    width, height = image.size
    if width * height <= max_pixels:
        return
    # A progressive JPEG holds all of its coefficients, at any scale.
    if image.format in ('JPEG', 'MPO') and not image.info.get('progressive'):
        for scale in (2, 4, 8):
            if (width // scale) * (height // scale) <= max_pixels:
                image.draft(None, (width // scale, height // scale))
                if image.width * image.height <= max_pixels:
                    return
    raise ValueError(
        f'{width} x {height} pixels are more than the {max_pixels} that are decoded (max_pixels)'
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
