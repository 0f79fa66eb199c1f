"""Features of folders of images, as the command and the package give them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets import BadImages, DataError, find_images
from ..datasets.listing import EXTENSIONS
from ..evaluation import Features, image_features
from ..fileio import atomic_path, check_destination
from .exporting import find_checkpoint
from .pretraining.plan import bad_limit


def embed(
    data: str | Path | Sequence[str | Path],
    checkpoint: str | Path,
    out: str | Path | None = None,
    *,
    max_bad: str | float = '1%',
    force: bool = False,
    **settings: Any,
) -> Features:
    """Features of images, and a file of them.

    Args:
        data: Folders, image files and lists of images, as pre-training takes them.
        checkpoint: File of any known format, or the folder of a run: its last checkpoint.
        out: ``.npz`` to write, with ``features`` ``(N, C)`` float32 and ``paths``; None: none.
        max_bad: Images that may be unreadable, a number or a share as '1%', at least 5.
        force: Replace ``out`` if it exists.
        **settings: Of :func:`~greenmim_mm.evaluation.image_features`: ``image_size``, ``resize``,
            ``window_size``, ``batch_size``, ``workers``, ``device``, ``progress``.

    Returns:
        The features, the paths that belong to them, and the images that could not be read.

    Raises:
        DataError: If there is no image, or too many cannot be read.
        FileNotFoundError: If there is no such checkpoint.
        FileExistsError: If ``out`` exists and ``force`` is not given.
        ValueError: If the checkpoint is damaged or no Swin, or ``out`` does not end in ``.npz``.
    """
    sources = [str(data)] if isinstance(data, (str, Path)) else [str(source) for source in data]
    if out is not None:
        if Path(out).suffix != '.npz':
            raise ValueError(f'--out {out} must end in .npz')
        check_destination(out, force)
    paths = list(find_images(sources))
    if not paths:
        raise DataError(f'no images found in {", ".join(sources)}; looked for {_kinds()}')
    features = image_features(find_checkpoint(checkpoint), paths, **settings)
    check_bad(features, len(paths), max_bad)
    if out is not None:
        with atomic_path(out, force) as temporary, open(temporary, 'wb') as file:
            np.savez(file, features=features.values, paths=np.array(features.paths))
    return features


def check_bad(features: Features, total: int, max_bad: str | float) -> None:
    """Raise :class:`~greenmim_mm.datasets.DataError` if too many images could not be read."""
    share = bad_limit(str(max_bad))
    limit = max(5, int(np.ceil(share * total))) if 0 < share < 1 else int(share)
    bad = BadImages(total, limit)
    for path, reason in features.bad.items():
        bad.add(path, reason)
    if not features.paths:
        raise bad.error('none is left')


def _kinds() -> str:
    return ', '.join(EXTENSIONS)


def labelled_features(
    folder: str | Path, checkpoint: str | Path, **settings: Any
) -> tuple[Features, np.ndarray, list[str]]:
    """Features of images that lie in a folder for each class.

    Returns:
        The features, the class of each as a number, and the names of the classes.

    Raises:
        ValueError: If there are no such folders.
    """
    names = sorted(entry.name for entry in Path(folder).iterdir() if entry.is_dir())
    names = [name for name in names if not name.startswith('.')]
    if not names:
        raise ValueError(f'{folder} has no folder for each class of its images')
    paths: list[str] = []
    labels: dict[str, int] = {}
    for number, name in enumerate(names):
        found = list(find_images(str(Path(folder, name))))
        paths += found
        labels |= dict.fromkeys(found, number)
    if not paths:
        raise DataError(f'no images found in {folder}; looked for {_kinds()}')
    features = image_features(checkpoint, paths, **settings)
    check_bad(features, len(paths), '1%')
    return features, np.array([labels[path] for path in features.paths]), names
