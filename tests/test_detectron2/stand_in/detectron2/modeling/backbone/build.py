from fvcore.common.registry import Registry

BACKBONE_REGISTRY = Registry('BACKBONE')
