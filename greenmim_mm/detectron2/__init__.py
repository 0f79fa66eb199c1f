"""GreenSwin and GreenSwinV2 as backbones of detectron2, which is needed for this alone.

detectron2 has a Swin, and no Swin V2. These take the weights of any format that the package
reads (``checkpoint=``) and give the features of ``greenmim_mm.GreenSwin`` in a detector of mmdet.

Example, in a LazyConfig::

    from detectron2.config import LazyCall as L
    from greenmim_mm.detectron2 import GreenSwin

    model.backbone.bottom_up = L(GreenSwin)(
        arch='base', window_size=7, drop_path_rate=0.3, checkpoint='epoch_200.pth'
    )

and with a yacs config::

    from greenmim_mm.detectron2 import add_greenswin_config

    cfg = get_cfg()
    add_greenswin_config(cfg)
    cfg.MODEL.BACKBONE.NAME = 'build_greenswin_fpn_backbone'
"""

try:
    import detectron2  # the library: this package is greenmim_mm.detectron2
except ModuleNotFoundError as error:
    if error.name != 'detectron2':
        raise
    raise ModuleNotFoundError(
        'greenmim_mm.detectron2 holds backbones for detectron2, which is not installed; it is not '
        'on PyPI: see INSTALL.md of its repository (facebookresearch/detectron2)',
        name='detectron2',
    ) from error
del detectron2

# ruff: noqa: E402 (the library is looked for first)
from .backbone import GreenSwin, GreenSwinV2
from .config import (
    add_greenswin_config,
    build_greenswin_backbone,
    build_greenswin_fpn_backbone,
)

__all__ = [
    'GreenSwin',
    'GreenSwinV2',
    'add_greenswin_config',
    'build_greenswin_backbone',
    'build_greenswin_fpn_backbone',
]
