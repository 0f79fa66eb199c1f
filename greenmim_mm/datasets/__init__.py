"""What mmpretrain's and mmdet's data sets lack: images of any kind, and runs that repeat."""

from .bad_images import BadImages
from .files import check_dataset
from .listing import DataError, find_images
from .loading import LoadImageFromFile
from .reading import UnreadableImageError, read_image
from .sampling import Draw, RepeatableSampler, seeded
from .unlabelled import UnlabelledImages

__all__ = [
    'BadImages',
    'DataError',
    'Draw',
    'LoadImageFromFile',
    'RepeatableSampler',
    'UnlabelledImages',
    'UnreadableImageError',
    'check_dataset',
    'find_images',
    'read_image',
    'seeded',
]
