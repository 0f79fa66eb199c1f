"""A data set of images of any kind, of which a few may be bad."""

import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from mmengine.dataset import BaseDataset

from ..registry import DATASETS
from .bad_images import BadImages
from .errors import DataError
from .listing import EXTENSIONS, find_images
from .reading import UnreadableImageError
from .sampling import Draw, seeded

_FEW = 5


@DATASETS.register_module()
class UnlabelledImages(BaseDataset):
    """Images without labels, for pre-training.

    An image that cannot be read is named once and passed over: the next one that can be takes its
    place, the same one in every run. Drawn by
    :class:`~greenmim_mm.datasets.sampling.RepeatableSampler`, all random numbers of the pipeline
    follow from the run's seed, the epoch and the index, whatever the number of workers.

    Args:
        data_root: Folders and files, see :func:`~greenmim_mm.datasets.listing.find_images`.
        data_prefix: Path below each of them.
        pipeline: Transforms; the first one reads ``img_path``, e.g.
            ``greenmim_mm.LoadImageFromFile``.
        max_bad: Bad images that are passed over: a number, or a share below 1 (then at least 5).
        **kwargs: Others of ``mmengine.dataset.BaseDataset``.

    Raises:
        DataError: If there is no image; from ``__getitem__`` if too many cannot be read.
        ValueError: If ``max_bad`` is negative.
    """

    def __init__(
        self,
        data_root: str | Sequence[str] = '',
        data_prefix: str = '',
        pipeline: Sequence[dict | Callable] = (),
        max_bad: float = 0.05,
        **kwargs: Any,
    ) -> None:
        if not max_bad >= 0:
            raise ValueError(f'max_bad={max_bad} must be a number of images, or a share below 1')
        self.sources = join_sources(data_root, data_prefix)
        self.max_bad = max_bad
        super().__init__(data_root='', data_prefix={}, pipeline=list(pipeline), **kwargs)

    def full_init(self) -> None:
        """Find the images."""
        if self._fully_initialized:
            return
        super().full_init()
        total, share = len(self), self.max_bad
        limit = max(_FEW, math.ceil(share * total)) if 0 < share < 1 else int(share)
        self.bad_images = BadImages(total, limit)

    def load_data_list(self) -> list[dict]:
        """Paths of the images, in a fixed order."""
        images = [dict(img_path=path) for path in find_images(self.sources)]
        if not images:
            raise DataError(
                f'{", ".join(self.sources)} has no image; looked for {", ".join(EXTENSIONS)}, in '
                'sub-folders, too'
            )
        return images

    def __getitem__(self, idx: int) -> Any:
        """What the pipeline makes of an image, or of the first usable one after it."""
        if not self._fully_initialized:
            self.full_init()
        idx_in_set = int(idx)
        for step in range(len(self)):
            info = self.get_data_info((idx_in_set + step) % len(self))
            path = info['img_path']
            if path in self.bad_images:
                continue
            try:
                # Seeded anew for each image: what was drawn for a bad one must not count.
                with seeded(*idx.entropy) if isinstance(idx, Draw) else nullcontext():
                    data = self.pipeline(info)
            except UnreadableImageError as error:
                self.bad_images.add(path, _reason(error))
                continue
            if data is None:
                self.bad_images.add(path, 'the pipeline makes nothing of it')
                continue
            return data
        raise self.bad_images.error('none is left')


def join_sources(data_root: str | Sequence[str], data_prefix: str = '') -> list[str]:
    """Folders and files that a data set's arguments name."""
    roots = [data_root] if isinstance(data_root, str) else list(data_root)
    return [os.path.join(root, data_prefix) if data_prefix else root for root in roots]


def _reason(error: UnreadableImageError) -> str:
    cause = error.__cause__
    return f'{type(cause).__name__}: {cause}' if cause else str(error)
