"""Models of the scope ``greenmim_mm``.

GreenSwin and GreenSwinV2 need mmengine alone. The pre-training algorithm needs mmpretrain, which
detection does without: it is imported when it is first built or asked for.
"""

from ..registry import MODELS
from .decoder import GreenMIMPretrainDecoder
from .green_swin import GreenSwin
from .green_swin_v2 import GreenSwinV2

__all__ = ['GreenMIM', 'GreenMIMPretrainDecoder', 'GreenSwin', 'GreenSwinV2']


@MODELS.register_module(name='GreenMIM')
def _build_greenmim(**kwargs):
    """Build :class:`~greenmim_mm.models.greenmim.GreenMIM` (an mmpretrain algorithm)."""
    return __getattr__('GreenMIM')(**kwargs)


def __getattr__(name: str):
    if name != 'GreenMIM':
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    try:
        from .greenmim import GreenMIM
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition('.')[0] != 'mmpretrain':
            raise
        raise ModuleNotFoundError(
            'GreenMIM pre-trains through mmpretrain, which is not installed; install the extra '
            "'maintained' (or 'openmmlab') of greenmim-mm",
            name='mmpretrain',
        ) from error
    return GreenMIM
