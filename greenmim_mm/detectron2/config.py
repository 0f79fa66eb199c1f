"""The backbones in yacs configs: ``MODEL.GREENSWIN`` and two names of ``BACKBONE_REGISTRY``."""

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, ShapeSpec

from .backbone import GreenSwin, GreenSwinV2


def add_greenswin_config(cfg: CfgNode) -> None:
    """Add ``cfg.MODEL.GREENSWIN`` with the usual values; call it before files are merged."""
    node = CfgNode()
    node.VERSION = 1  # 2: Swin V2
    node.ARCH = 'tiny'
    node.WINDOW_SIZE = []  # one for all stages, or four; empty: the checkpoint's
    node.PRETRAINED_WINDOW_SIZES = []  # Swin V2 alone; empty: the checkpoint's
    node.DROP_PATH_RATE = 0.1
    node.OUT_INDICES = [0, 1, 2, 3]
    node.OUT_FEATURES = []  # names; empty: 'p0' to 'p3'
    node.FROZEN_STAGES = -1
    node.WITH_CP = False
    node.SIZE_DIVISIBILITY = 32
    node.SQUARE_PAD = 0
    # Any of the nine formats. What MODEL.WEIGHTS has for the backbone comes after it and wins.
    node.CHECKPOINT = ''
    cfg.MODEL.GREENSWIN = node


@BACKBONE_REGISTRY.register()
def build_greenswin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build the backbone of ``cfg.MODEL.GREENSWIN``.

    Args:
        cfg: The whole config, with :func:`add_greenswin_config`'s part.
        input_shape: Channels of the images.
    """
    node = cfg.MODEL.GREENSWIN
    if node.VERSION not in (1, 2):
        raise ValueError(f'MODEL.GREENSWIN.VERSION={node.VERSION} must be 1 or 2')
    windows = tuple(node.WINDOW_SIZE)
    arguments = dict(
        arch=node.ARCH,
        in_channels=input_shape.channels,
        window_size=windows[0] if len(windows) == 1 else windows or None,
        drop_path_rate=node.DROP_PATH_RATE,
        out_indices=node.OUT_INDICES,
        out_features=node.OUT_FEATURES or None,
        frozen_stages=node.FROZEN_STAGES,
        with_cp=node.WITH_CP,
        size_divisibility=node.SIZE_DIVISIBILITY,
        square_pad=node.SQUARE_PAD,
        checkpoint=node.CHECKPOINT or None,
    )
    if node.VERSION == 1:
        return GreenSwin(**arguments)
    return GreenSwinV2(pretrained_window_sizes=node.PRETRAINED_WINDOW_SIZES or None, **arguments)


@BACKBONE_REGISTRY.register()
def build_greenswin_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build detectron2's FPN over :func:`build_greenswin_backbone`.

    ``cfg.MODEL.FPN.IN_FEATURES`` names its features, ``['p0', 'p1', 'p2', 'p3']``.
    """
    from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool

    return FPN(
        bottom_up=build_greenswin_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
