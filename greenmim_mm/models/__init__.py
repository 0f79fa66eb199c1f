"""Models of the scope ``greenmim_mm``.

GreenSwin and GreenSwinV2 need mmengine alone. The pre-training algorithm needs mmpretrain, which
detection does without: it is imported when it is first built or asked for.
"""

from importlib import import_module

from ..registry import MODELS
from .decoder import GreenMIMPretrainDecoder
from .green_swin import GreenSwin
from .green_swin_v2 import GreenSwinV2

# Name and module of what needs mmpretrain.
_LAZY = {
    'GreenMIM': '.greenmim',
    'SimMIMNormHead': '.simmim_head',
    'SimMIMSwinTransformerV2': '.simmim',
}

__all__ = [
    'GreenMIM',
    'GreenMIMPretrainDecoder',
    'GreenSwin',
    'GreenSwinV2',
    'SimMIMNormHead',
    'SimMIMSwinTransformerV2',
]


@MODELS.register_module(name='GreenMIM')
def _build_greenmim(**kwargs):
    """Build :class:`~greenmim_mm.models.greenmim.GreenMIM` (an mmpretrain algorithm)."""
    return __getattr__('GreenMIM')(**kwargs)


@MODELS.register_module(name='SimMIMSwinTransformerV2')
def _build_simmim_swin_v2(**kwargs):
    """Build :class:`~greenmim_mm.models.simmim.SimMIMSwinTransformerV2` (on mmpretrain's V2)."""
    return __getattr__('SimMIMSwinTransformerV2')(**kwargs)


@MODELS.register_module(name='SimMIMNormHead')
def _build_simmim_norm_head(**kwargs):
    """Build :class:`~greenmim_mm.models.simmim_head.SimMIMNormHead` (on mmpretrain's head)."""
    return __getattr__('SimMIMNormHead')(**kwargs)


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    try:
        return getattr(import_module(_LAZY[name], __name__), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition('.')[0] != 'mmpretrain':
            raise
        raise ModuleNotFoundError(
            f'{name} pre-trains through mmpretrain, which is not installed; install the extra '
            "'maintained' (or 'openmmlab') of greenmim-mm",
            name='mmpretrain',
        ) from error
