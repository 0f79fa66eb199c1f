"""GreenMIM for OpenMMLab: cheap masked image modelling for hierarchical vision transformers.

Importing the package is light: the model classes are found through the registries
(``type='greenmim_mm.GreenSwin'``) or imported from :mod:`greenmim_mm.models`, and what the command
``greenmim`` does is imported when it is asked for.
"""

from importlib import import_module

from .plugin import announce
from .version import __version__

# Where the names of the package's face come from.
_FACE = {
    'UnlabelledImages': '.datasets',
    'create_model': '.evaluation',
    'embed': '.cli.embedding',
    'export': '.cli.exporting',
    'pretrain': '.cli.pretraining.calling',
}

__all__ = ['UnlabelledImages', '__version__', 'create_model', 'embed', 'export', 'pretrain']

announce()


def __getattr__(name: str) -> object:
    """Import the names of the package's face when they are asked for."""
    if name in _FACE:
        return getattr(import_module(_FACE[name], __name__), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
