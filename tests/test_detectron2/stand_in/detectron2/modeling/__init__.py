"""What ``detectron2.modeling`` exports of backbones."""

from detectron2.layers import ShapeSpec

from .backbone import BACKBONE_REGISTRY, FPN, Backbone

__all__ = ['BACKBONE_REGISTRY', 'FPN', 'Backbone', 'ShapeSpec']
