"""GreenMIM for OpenMMLab: cheap masked image modelling for hierarchical vision transformers.

Importing the package is light: the model classes are found through the registries
(``type='greenmim_mm.GreenSwin'``) or imported from :mod:`greenmim_mm.models`.
"""

from .version import __version__

__all__ = ['__version__']
