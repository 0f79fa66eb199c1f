"""What mmpretrain's and mmdet's data sets lack: images of any kind, and runs that repeat."""

from .bad_images import BadImages
from .contents import check_contents, coco_classes
from .cropping import LoadRandomResizedCrop
from .errors import DataError
from .files import check_dataset
from .listing import find_images
from .loading import LoadImageFromFile, PassOverBadImages
from .reading import UnreadableImageError, read_image
from .sampling import Draw, RepeatableSampler, seeded
from .unlabelled import UnlabelledImages

__all__ = [
    'BadImages',
    'DataError',
    'Draw',
    'LoadImageFromFile',
    'LoadRandomResizedCrop',
    'PassOverBadImages',
    'RepeatableSampler',
    'UnlabelledImages',
    'UnreadableImageError',
    'check_contents',
    'check_dataset',
    'coco_classes',
    'find_images',
    'read_image',
    'seeded',
]
