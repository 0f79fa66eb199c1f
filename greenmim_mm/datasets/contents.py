"""Checks that what lies in a data set fits together, and fits the model."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import DataError, some
from .files import datasets_of, image_folder, join, kind_of


def check_contents(
    dataset: Mapping[str, Any], option: str = 'dataset', model: Mapping[str, Any] | None = None
) -> None:
    """Check the classes and images of a data set whose files are there.

    Looks at ImageNet and other folders of classes (mmpretrain), COCO data sets (mmdet) and ADE20K
    (mmseg), as :func:`~greenmim_mm.datasets.check_dataset` does. Annotation files are read whole:
    a few seconds for COCO's.

    Args:
        dataset: Config of the data set.
        option: Where it lies in the config, e.g. ``train_dataloader.dataset``.
        model: Config of the model that is to learn from it; its heads must have as many classes.

    Raises:
        DataError: If images or maps of classes are missing, an annotation file is damaged, or the
            classes are not those to be learned.
    """
    for inner, name in datasets_of(dataset, option):
        kind = kind_of(inner)
        if kind == 'UnlabelledImages':  # has no classes, and may have several roots
            continue
        root, folder = inner.get('data_root') or '', image_folder(inner)
        if inner.get('backend_args') or '://' in folder:
            continue
        classes = (inner.get('metainfo') or {}).get('classes')
        if kind in ('ImageNet', 'CustomDataset') and _learns_from_folders(inner):
            classes = _check_class_folders(folder, classes, kind, name)
        elif kind == 'CocoDataset' and inner.get('ann_file'):
            classes = _check_coco(join(root, inner['ann_file']), folder, classes, name)
        elif kind == 'ADE20KDataset':
            _check_maps(folder, join(root, inner['data_prefix']['seg_map_path']), name)
        if classes is not None and model is not None:
            _check_heads(model, len(classes), name)


def coco_classes(ann_file: str | Path) -> tuple[str, ...]:
    """Names of the classes of an annotation file, in the order in which mmdet numbers them.

    Raises:
        DataError: If the file is missing, damaged or has no classes, or two of one name.
    """
    classes = tuple(category['name'] for category in _read_coco(ann_file)['categories'])
    if not classes:
        raise DataError(f'annotation file {ann_file} names no classes')
    twice = sorted({name for name in classes if classes.count(name) > 1})
    if twice:
        raise DataError(f'annotation file {ann_file} names classes twice: {some(twice)}')
    return classes


def _learns_from_folders(dataset: Mapping[str, Any]) -> bool:
    """Whether mmpretrain takes the classes of images from the folders in which they lie."""
    split = dataset.get('split')
    listed = split and os.path.isfile(join(dataset.get('data_root') or '', f'meta/{split}.txt'))
    return bool(
        dataset.get('with_label', True)
        and split != 'test'
        and not dataset.get('ann_file')
        and not listed
    )


def _check_class_folders(
    folder: str, classes: Sequence[str] | None, kind: str, name: str
) -> Sequence[str]:
    """Classes of a folder of folders, which must be as many as expected."""
    found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if kind == 'ImageNet' and classes is None:
        from mmpretrain.datasets import ImageNet

        classes = ImageNet.METAINFO['classes']
    if classes is not None and len(found) != len(classes):
        raise DataError(
            f'data folder {folder} of {name} has {len(found)} folders of classes ({some(found)}) '
            f'where {len(classes)} are expected; unpack all of them, or for a data set of your own '
            f'set --cfg-options {name}.type=CustomDataset and num_classes of the head'
        )
    return found


def _check_coco(
    ann_file: str, folder: str, classes: Sequence[str] | None, name: str
) -> Sequence[str]:
    """Classes to be learned, which must be in the file, as its images in the folder."""
    content = _read_coco(ann_file)
    if classes is None:
        from mmdet.datasets import CocoDataset

        classes = CocoDataset.METAINFO['classes']
    there = [category['name'] for category in content['categories']]
    unknown = [one for one in classes if one not in there]
    if unknown:
        # mmdet would number the others anew and learn wrong names without a word.
        raise DataError(
            f'annotation file {ann_file} of {name} has {len(there)} classes ({some(there)}), but '
            f'not {len(unknown)} of the {len(classes)} to be learned ({some(unknown)}); name its '
            f'own with {name}.metainfo.classes and set num_classes of the heads, as '
            'configs/custom does'
        )
    # One listing of each folder: a look for each image takes minutes on network drives.
    listed: dict[str, set[str]] = {}
    missing = []
    for image in content['images']:
        parent, file = os.path.split(os.path.join(folder, image['file_name']))
        if parent not in listed:
            listed[parent] = set(os.listdir(parent)) if os.path.isdir(parent) else set()
        if file not in listed[parent]:
            missing.append(os.path.join(parent, file))
    if missing:
        raise DataError(
            f'{len(missing)} of the {len(content["images"])} images that annotation file '
            f'{ann_file} of {name} lists are missing: {some(missing)}; put them there, or take '
            'them out of the file'
        )
    return classes


def _read_coco(ann_file: str | Path) -> dict:
    try:
        content = json.loads(Path(ann_file).read_bytes())
    except FileNotFoundError as error:
        raise DataError(f'annotation file {ann_file} does not exist') from error
    except (OSError, ValueError) as error:
        raise DataError(f'annotation file {ann_file} cannot be read: {error}') from error
    for key in ('images', 'categories'):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"annotation file {ann_file} is not in COCO's format: no list {key!r}")
    return content


def _check_maps(images: str, maps: str, name: str) -> None:
    """Check that each image has its map of classes."""
    if not os.path.isdir(maps):
        raise DataError(f'folder {maps} of {name}, the maps of classes, does not exist')
    there = {os.path.splitext(file)[0] for file in os.listdir(maps)}
    wanted = sorted(os.path.splitext(file)[0] for file in os.listdir(images))
    missing = [file for file in wanted if file not in there]
    if missing:
        raise DataError(
            f'{len(missing)} of the {len(wanted)} images in {images} of {name} have no map of '
            f'classes in {maps}: {some(missing)}'
        )


def _check_heads(model: Any, num_classes: int, name: str, place: str = 'model') -> None:
    """Check that all heads of a model have as many classes as its data."""
    if isinstance(model, (list, tuple)):
        for index, inner in enumerate(model):
            _check_heads(inner, num_classes, name, f'{place}.{index}')
    elif isinstance(model, Mapping):
        for key, inner in model.items():
            if key == 'num_classes' and inner != num_classes and not place.endswith('rpn_head'):
                raise DataError(
                    f'{name} has {num_classes} classes and {place}.num_classes is {inner}; set '
                    f'--cfg-options {place}.num_classes={num_classes}'
                )
            _check_heads(inner, num_classes, name, f'{place}.{key}')
