"""Registries of the scope ``greenmim_mm``, children of mmengine's roots.

mmengine imports this module when it meets a scoped name such as ``greenmim_mm.GreenSwin``, and
the ``locations`` are imported at the first look-up. No config needs ``custom_imports``.
"""

from mmengine import registry
from mmengine.registry import Registry


def _child(root: str, name: str, *locations: str) -> Registry:
    """The child of one of mmengine's registries, with the modules that fill it."""
    parent = getattr(registry, root)
    return Registry(name, parent=parent, scope='greenmim_mm', locations=list(locations))


MODELS = _child('MODELS', 'model', 'greenmim_mm.models')
TRANSFORMS = _child('TRANSFORMS', 'transform', 'greenmim_mm.datasets')
DATASETS = _child('DATASETS', 'dataset', 'greenmim_mm.datasets')
DATA_SAMPLERS = _child('DATA_SAMPLERS', 'data sampler', 'greenmim_mm.datasets')
HOOKS = _child('HOOKS', 'hook', 'greenmim_mm.engine.hooks')
OPTIM_WRAPPER_CONSTRUCTORS = _child(
    'OPTIM_WRAPPER_CONSTRUCTORS', 'optimizer wrapper constructor', 'greenmim_mm.engine.optimizers'
)
LOOPS = _child('LOOPS', 'loop', 'greenmim_mm.engine.loops', 'greenmim_mm.evaluation')
