"""Checks that a data set's files are there, before a model is built."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import DataError
from .listing import EXTENSIONS, find_images
from .unlabelled import join_sources

_IMAGE_FOLDERS = ('CustomDataset', 'ImageNet', 'ImageNet21k')
_COCO_LIKE = ('CocoDataset', 'ADE20KDataset')
# mmpretrain's default of the argument ``extensions``.
_EXTENSIONS = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif')


def check_dataset(dataset: Mapping[str, Any], option: str = 'dataset') -> None:
    """Check that the files of a data set config exist.

    Looks at mmpretrain's image folders, mmdet's COCO data sets and mmseg's ADE20K, also inside
    wrappers such as ``RepeatDataset``. Other data sets (some download themselves) and remote
    storage pass.

    Args:
        dataset: Config of the data set.
        option: Where it lies in the config, e.g. ``train_dataloader.dataset``; the message tells
            the user to set ``<option>.data_root``.

    Raises:
        DataError: If a folder or an annotation file does not exist or a folder has no image.
    """
    for inner, name in datasets_of(dataset, option):
        kind = kind_of(inner)
        if kind == 'UnlabelledImages':
            _check_unlabelled(inner, name)
            continue
        if inner.get('backend_args') or kind not in _IMAGE_FOLDERS + _COCO_LIKE:
            continue
        root = inner.get('data_root') or ''
        folder, ann_file = image_folder(inner), inner.get('ann_file') or ''
        if '://' in folder:
            continue
        remedy = f'set it with --cfg-options {name}.data_root=FOLDER'
        if not folder:
            raise DataError(f'{name} names no data folder; {remedy}')
        if not os.path.isdir(folder):
            raise DataError(f'data folder {folder} of {name} does not exist; {remedy}')
        if ann_file and not os.path.isfile(join(root, ann_file)):
            raise DataError(
                f'annotation file {join(root, ann_file)} of {name} does not exist; put it there '
                f'or {remedy}'
            )
        # Listed images are not searched for: their names may have any ending.
        searched = kind in _IMAGE_FOLDERS and not ann_file
        extensions = tuple(inner.get('extensions') or _EXTENSIONS) if searched else ('',)
        # With labels mmpretrain takes classes from subfolders and no image beside them.
        below = searched and inner.get('with_label', True) and inner.get('split') != 'test'
        if not _has_file(Path(folder), extensions, below):
            place = 'the folders of classes in it' if below else 'it or in its subfolders'
            raise DataError(
                f'data folder {folder} of {name} has no image'
                + (f' ({", ".join(extensions)}) in {place}' if searched else '')
                + f'; put images there, or name another folder: {remedy}'
            )


def _check_unlabelled(dataset: Mapping[str, Any], name: str) -> None:
    remedy = f'set it with --cfg-options {name}.data_root=FOLDER'
    sources = join_sources(dataset.get('data_root', ''), dataset.get('data_prefix', ''))
    if not all(sources):
        raise DataError(f'{name} names no data folder; {remedy}')
    for source in sources:
        if not os.path.lexists(os.path.expanduser(source)):
            raise DataError(f'data folder {source} of {name} does not exist; {remedy}')
        if next(find_images(source), None) is None:
            raise DataError(
                f'data folder {source} of {name} has no image ({", ".join(EXTENSIONS)}) in it or '
                f'in its subfolders; put images there, or name another folder: {remedy}'
            )


def datasets_of(dataset: Any, name: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The data sets inside wrappers, with their place in the config."""
    if isinstance(dataset, (list, tuple)):
        for index, inner in enumerate(dataset):
            yield from datasets_of(inner, f'{name}.{index}')
    elif isinstance(dataset, Mapping):
        yield dataset, name
        for key in ('dataset', 'datasets'):
            yield from datasets_of(dataset.get(key), f'{name}.{key}')


def kind_of(dataset: Mapping[str, Any]) -> str:
    """Name of the class of a data set, without its scope or module."""
    kind = dataset.get('type', '')
    kind = kind if isinstance(kind, str) else getattr(kind, '__name__', '')
    return kind.rpartition('.')[2]


def image_folder(dataset: Mapping[str, Any]) -> str:
    """Where the images of a data set lie; empty if it does not say."""
    prefix = dataset.get('data_prefix') or dataset.get('split') or ''
    if isinstance(prefix, Mapping):
        prefix = prefix.get('img_path', prefix.get('img', ''))
    return join(dataset.get('data_root') or '', prefix)


def join(root: str, path: str) -> str:
    """A path below the root of a data set, or the root."""
    return os.path.expanduser(os.path.join(root, path) if path else root)


def _has_file(folder: Path, extensions: tuple[str, ...], below: bool) -> bool:
    """Whether a file with one of the endings lies in the folder; stops at the first."""
    for path, _, names in os.walk(folder, followlinks=True):
        if below and Path(path) == folder:
            continue
        if any(name.lower().endswith(extensions) for name in names):
            return True
    return False
