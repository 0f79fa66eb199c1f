"""What mmpretrain's and mmdet's data sets lack: errors that say which file is at fault."""

from .files import DataError, check_dataset
from .loading import LoadImageFromFile, UnreadableImageError

__all__ = ['DataError', 'LoadImageFromFile', 'UnreadableImageError', 'check_dataset']
