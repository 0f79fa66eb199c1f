"""Registries of the scope ``greenmim_mm``, children of mmengine's roots.

mmengine imports this module when it meets a scoped name such as ``greenmim_mm.GreenSwin``, and
the ``locations`` are imported at the first look-up. No config needs ``custom_imports``.
"""

from mmengine.registry import DATA_SAMPLERS as MMENGINE_DATA_SAMPLERS
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import LOOPS as MMENGINE_LOOPS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry

MODELS = Registry(
    'model', parent=MMENGINE_MODELS, scope='greenmim_mm', locations=['greenmim_mm.models']
)

TRANSFORMS = Registry(
    'transform', parent=MMENGINE_TRANSFORMS, scope='greenmim_mm', locations=['greenmim_mm.datasets']
)

DATASETS = Registry(
    'dataset', parent=MMENGINE_DATASETS, scope='greenmim_mm', locations=['greenmim_mm.datasets']
)

DATA_SAMPLERS = Registry(
    'data sampler',
    parent=MMENGINE_DATA_SAMPLERS,
    scope='greenmim_mm',
    locations=['greenmim_mm.datasets'],
)

HOOKS = Registry(
    'hook', parent=MMENGINE_HOOKS, scope='greenmim_mm', locations=['greenmim_mm.engine.hooks']
)

OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope='greenmim_mm',
    locations=['greenmim_mm.engine.optimizers'],
)

LOOPS = Registry(
    'loop',
    parent=MMENGINE_LOOPS,
    scope='greenmim_mm',
    locations=['greenmim_mm.engine.loops', 'greenmim_mm.evaluation'],
)
