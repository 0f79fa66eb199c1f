"""``CfgNode``, which detectron2 derives from fvcore's."""

from fvcore.common.config import CfgNode as _CfgNode


class CfgNode(_CfgNode):
    """The config of detectron2, without its versions."""
