"""What mmpretrain's and mmdet's data sets lack: errors that say which file is at fault."""

from .contents import check_contents, coco_classes
from .errors import DataError
from .files import check_dataset
from .loading import LoadImageFromFile, UnreadableImageError

__all__ = [
    'DataError',
    'LoadImageFromFile',
    'UnreadableImageError',
    'check_contents',
    'check_dataset',
    'coco_classes',
]
