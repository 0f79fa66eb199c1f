"""GreenMIM for OpenMMLab: cheap masked image modelling for hierarchical vision transformers.

Importing the package is light: the model classes are found through the registries
(``type='greenmim_mm.GreenSwin'``) or imported from :mod:`greenmim_mm.models`.
"""

from .plugin import announce
from .version import __version__

__all__ = ['UnlabelledImages', '__version__']

announce()


def __getattr__(name: str) -> object:
    """Import the classes of the package's face when they are asked for."""
    if name == 'UnlabelledImages':
        from .datasets import UnlabelledImages

        return UnlabelledImages
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
