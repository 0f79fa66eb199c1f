"""When a block may compute two layers in one step that keeps less for the backward pass.

The layers of :mod:`.layers`, called one after the other, are the network. In training a block
prefers to fuse a norm or an activation with the linear layer behind it
(:mod:`greenmim_mm.ops.recompute`), which reads the parameters and calls no module. That is right
as long as the modules are what they are taken for: whoever put a LoRA layer in the place of a
linear one, registered a hook, pruned, quantised or parametrised gets the modules called.
"""

from collections.abc import Iterable
from functools import cache

import torch
from mmengine.logging import print_log
from torch import nn

from ..compat import has_global_hooks
from ..ops import recompute_obstacle

# Settings that the fused computation takes for granted.
_AS_BUILT = {
    nn.GELU: lambda module: module.approximate == 'none',
    nn.LayerNorm: lambda module: module.weight is not None and module.bias is not None,
    nn.Sequential: lambda module: len(module) == 2,
}

Parts = Iterable[tuple[nn.Module, type[nn.Module]]]


def lean(parts: Parts) -> bool:
    """Whether modules may be fused: :func:`obstacle` finds none; else the log says why, once.

    Args:
        parts: Each module that would not be called, and the class that it must be.
    """
    if recompute_obstacle():
        return False
    reason = obstacle(parts)
    if reason is not None and torch.is_grad_enabled():
        _tell(reason)
    return reason is None


def obstacle(parts: Parts) -> str | None:
    """Why modules must be called rather than fused; None if nothing speaks against it.

    Args:
        parts: Each module that would not be called, and the class that it must be. Read one by
            one: what comes after an obstacle is never asked for.
    """
    if has_global_hooks():
        return 'hooks for all modules are registered'
    for module, kind in parts:
        # Exactly: a subclass may compute something else. A parametrised layer is a subclass.
        if type(module) is not kind:
            return f'{type(module).__name__} stands in the place of {kind.__name__}'
        state = vars(module)
        if (
            state['_forward_hooks']
            or state['_forward_pre_hooks']
            or state['_backward_hooks']
            or state['_backward_pre_hooks']
        ):
            return f'hooks are registered on {kind.__name__}'
        if 'forward' in state:
            return f'the forward method of {kind.__name__} is replaced'
        for name, parameter in state['_parameters'].items():
            if type(parameter) not in (nn.Parameter, torch.Tensor, type(None)):
                return f'the {name} of {kind.__name__} is a {type(parameter).__name__}'
        if kind in _AS_BUILT and not _AS_BUILT[kind](module):
            return f'{kind.__name__} has other settings'
    return None


@cache
def _tell(reason: str) -> None:
    print_log(
        f'training calls layers one by one, which needs more memory: {reason}', logger='current'
    )
