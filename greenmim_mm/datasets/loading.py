"""Loading of images that names the file that cannot be read, and may pass it over."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO

from mmcv.transforms import BaseTransform
from mmengine.fileio import get
from mmengine.logging import print_log
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS

from ..registry import TRANSFORMS
from .errors import DataError
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


# Fewer say nothing about a share.
_FEW = 5


@TRANSFORMS.register_module()
class PassOverBadImages(BaseTransform):
    """Load images; of one that cannot be loaded nothing is made, and a warning names it once.

    For training with the labelled data sets of OpenMMLab: where a pipeline makes nothing of an
    image, mmengine's ``BaseDataset`` draws another one in its stead. (It does not in a test, where
    an image that is left out would change the result.)

    Args:
        transform: What loads, e.g. ``dict(type='LoadImageFromFile')`` of any package.
        max_bad: Share of bad images among those that a process reads up to which they are passed
            over; 5 always are.

    Raises:
        DataError: From ``transform`` if there are more.
        ValueError: If ``max_bad`` is no share.
    """

    def __init__(self, transform: dict | Callable[[dict], dict], max_bad: float = 0.05) -> None:
        if not 0 <= max_bad <= 1:
            raise ValueError(f'max_bad={max_bad} must be a share, from 0 to 1')
        built = isinstance(transform, dict)
        self.load = MMENGINE_TRANSFORMS.build(transform) if built else transform
        self.max_bad = max_bad
        self._read = self._bad = 0
        self._named: set[str] = set()

    def transform(self, results: dict) -> dict | None:
        """What the inner transform makes of an image, or None."""
        self._read += 1
        try:
            return self.load(results)
        # Each loader has its own exceptions; mmcv's is an AssertionError.
        except Exception as error:
            self._bad += 1
            path = str(results.get('img_path'))
            reason = ' '.join(str(error).split()) or type(error).__name__
            if self._bad > max(_FEW, self.max_bad * self._read):
                raise DataError(
                    f'{self._bad} of {self._read} images cannot be used, more than max_bad='
                    f'{self.max_bad:g} of them; the last one is {path} ({reason})'
                ) from error
            if path not in self._named:
                self._named.add(path)
                print_log(f'{path} is passed over: {reason}', 'current', 30)
            return None

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.load}, max_bad={self.max_bad})'


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
