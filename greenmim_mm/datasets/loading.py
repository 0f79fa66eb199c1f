"""Loading of images that names the file that cannot be read."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

from mmcv.transforms import BaseTransform
from mmengine.fileio import get

from ..registry import TRANSFORMS
from .reading import MAX_PIXELS, UnreadableImageError, read_image


@TRANSFORMS.register_module()
class LoadImageFromFile(BaseTransform):
    """Load images of any kind, whole or not at all.

    ``mmcv.LoadImageFromFile`` fills up what a cut-off JPEG lacks with grey, and its errors do not
    name the file: among a million images that one is not found again.

    Required keys: ``img_path``. Added keys: ``img`` (``(H, W, 3)`` uint8, BGR), ``img_shape`` and
    ``ori_shape`` (height, width).

    Args:
        max_pixels: Larger images are decoded at a smaller scale or refused, see
            :func:`~greenmim_mm.datasets.reading.read_image`.
        backend_args: Where the files lie, as in mmengine; local files are read as they are needed.
    """

    def __init__(self, max_pixels: int = MAX_PIXELS, backend_args: dict | None = None) -> None:
        self.max_pixels = max_pixels
        self.backend_args = backend_args

    def transform(self, results: dict) -> dict:
        """Read ``results['img_path']``.

        Raises:
            UnreadableImageError: If that cannot be done.
        """
        path = results['img_path']
        with open_source(path, self.backend_args) as source:
            image = read_image(source, self.max_pixels)
        results['img'] = image
        results['img_shape'] = results['ori_shape'] = image.shape[:2]
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(max_pixels={self.max_pixels})'


@contextmanager
def open_source(path: str, backend_args: dict | None = None) -> Iterator[str | BytesIO]:
    """What an image is read from; what goes wrong in the block is said with the file's name.

    Args:
        path: Of a local file, or what mmengine reads by a backend.
        backend_args: Where the files lie, as in mmengine.

    Returns:
        The path, or the content of a file that lies elsewhere.

    Raises:
        UnreadableImageError: Whatever was raised.
    """
    try:
        remote = backend_args or '://' in path
        yield BytesIO(get(path, backend_args)) if remote else path
    # Each decoder and storage backend has its own exceptions.
    except Exception as error:
        reason = ' '.join(str(error).split()) or 'no reason given'
        raise UnreadableImageError(
            f'image {path} cannot be read; replace or remove the file '
            f'({type(error).__name__}: {reason})'
        ) from error
