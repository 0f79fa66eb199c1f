"""Decoding, cropping and resizing in one: what a pre-training step waits for on the host."""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from mmcv.transforms import BaseTransform
from torch.nn import functional
from torchvision.transforms import RandomResizedCrop

from ..registry import TRANSFORMS
from .loading import open_source
from .reading import MAX_PIXELS, decode, opened, oriented_size

_INTERPOLATIONS = ('bicubic', 'bilinear')


@TRANSFORMS.register_module()
class LoadRandomResizedCrop(BaseTransform):
    """Read an image of any kind, cut a random box out of it and resize that.

    In the place of :class:`~greenmim_mm.datasets.LoadImageFromFile` and mmpretrain's
    ``RandomResizedCrop``, and faster: PyTorch's antialiased kernel for bytes resizes the box, and
    a JPEG that is much larger than needed is decoded at a half, a quarter or an eighth of its
    size. The image that was decoded last is kept: with ``repeats`` of
    :class:`~greenmim_mm.datasets.RepeatableSampler`, it is the next one, too. What comes out
    depends on the file and the random numbers alone.

    Required keys: ``img_path``. Added keys: ``img`` (``(*scale, 3)`` uint8, BGR), ``img_shape`` and
    ``ori_shape`` (height, width; that of the file, turned upright).

    Args:
        scale: Height and width of the result, or the side of a square.
        crop_ratio_range: Range of the box' area, relative to the image's.
        aspect_ratio_range: Range of the box' width over its height.
        interpolation: 'bicubic' or 'bilinear', both antialiased.
        oversampling: A JPEG is decoded at a smaller size if the box then still has so many times
            the result's pixels in both directions; ``inf`` always decodes the whole size.
        max_pixels: As in :class:`~greenmim_mm.datasets.LoadImageFromFile`.
        backend_args: As there.

    Raises:
        ValueError: If a value makes no sense.
    """

    def __init__(
        self,
        scale: int | Sequence[int],
        crop_ratio_range: tuple[float, float] = (0.08, 1.0),
        aspect_ratio_range: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: str = 'bicubic',
        oversampling: float = 1.5,
        max_pixels: int = MAX_PIXELS,
        backend_args: dict | None = None,
    ) -> None:
        height, width = scale if isinstance(scale, Sequence) else (scale, scale)
        if min(height, width) < 1:
            raise ValueError(f'scale={scale} must be positive: a side, or (height, width)')
        for name, (low, high), most in (
            ('crop_ratio_range', crop_ratio_range, 1.0),
            ('aspect_ratio_range', aspect_ratio_range, np.inf),
        ):
            if not 0 < low <= high <= most:
                raise ValueError(f'{name}={(low, high)} must be (least, most), 0 < least <= most')
        if interpolation not in _INTERPOLATIONS:
            raise ValueError(
                f'interpolation={interpolation!r} is unknown; use one of '
                f'{", ".join(_INTERPOLATIONS)}'
            )
        if not oversampling >= 1:
            raise ValueError(f'oversampling={oversampling} must be at least 1')
        self.scale = (height, width)
        self.crop_ratio_range = tuple(crop_ratio_range)
        self.aspect_ratio_range = tuple(aspect_ratio_range)
        self.interpolation = interpolation
        self.oversampling = oversampling
        self.max_pixels = max_pixels
        self.backend_args = backend_args
        self._path, self._size = '', (0, 0)
        self._decoded: dict[int, np.ndarray] = {}

    def transform(self, results: dict) -> dict:
        """Read ``results['img_path']``.

        Raises:
            UnreadableImageError: If that cannot be done.
        """
        path = results['img_path']
        if path != self._path:
            self._path, self._decoded = '', {}
            with open_source(path, self.backend_args) as source, opened(source) as image:
                self._size = oriented_size(image)
                box, divisor = self._draw()
                self._decoded[divisor] = decode(image, self.max_pixels, divisor)
            self._path = path
        else:
            box, divisor = self._draw()
            if divisor not in self._decoded:
                # As it would be if the image had not been kept: a result must not depend on that.
                with open_source(path, self.backend_args) as source, opened(source) as image:
                    self._decoded[divisor] = decode(image, self.max_pixels, divisor)
        results['img'] = self._cut(self._decoded[divisor], box)
        results['img_shape'], results['ori_shape'] = self.scale, self._size
        return results

    def _draw(self) -> tuple[tuple[int, int, int, int], int]:
        """A box (top, left, height, width) in the whole image, and by what that can be divided."""
        canvas = torch.empty(1, *self._size, device='meta')  # its shape is all that is asked for
        box = RandomResizedCrop.get_params(
            canvas, list(self.crop_ratio_range), list(self.aspect_ratio_range)
        )
        room = min(side / wanted for side, wanted in zip(box[2:], self.scale, strict=True))
        divisor = max(d for d in (1, 2, 4, 8) if d == 1 or room >= d * self.oversampling)
        return box, divisor

    def _cut(self, pixels: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
        """The box out of an image that may have been decoded at another size, resized, BGR."""
        top, left, height, width = box
        down, across = (now / whole for now, whole in zip(pixels.shape, self._size, strict=False))
        rows = slice(int(top * down), max(int(top * down) + 1, round((top + height) * down)))
        columns = slice(
            int(left * across), max(int(left * across) + 1, round((left + width) * across))
        )
        part = torch.from_numpy(pixels[rows, columns].copy()).permute(2, 0, 1)[None]
        resized = functional.interpolate(
            part, self.scale, mode=self.interpolation, antialias=True, align_corners=False
        )
        # Planes of colours, red first; merging them is faster than turning the axes.
        return cv2.merge(resized[0].numpy()[::-1])

    def __repr__(self) -> str:
        names = ('scale', 'crop_ratio_range', 'aspect_ratio_range', 'interpolation', 'oversampling')
        values = ', '.join(f'{name}={getattr(self, name)!r}' for name in names)
        return f'{type(self).__name__}({values}, max_pixels={self.max_pixels})'
