"""What the versions of torch and OpenMMLab that this package runs beside do differently.

``setup.py`` names the oldest and the newest. The rest of the package asks for no version: what one
of them lacks or calls otherwise is settled here.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverloadPacket
from torch.nn.modules import module as _module
from torch.utils._pytree import tree_map

# Since torch 2.2 this has a public name.
is_compiling = getattr(torch.compiler, 'is_compiling', None) or torch._utils.is_compiling


def is_exporting() -> bool:
    """Whether torch.export traces; before torch 2.7 it cannot be told from a compiler."""
    # Dynamo takes torch.compiler.is_exporting for True in whatever it compiles; the flag is true.
    return getattr(torch.compiler, '_is_exporting_flag', False)


def compiles_functions() -> bool:
    """Whether a compiler is at work that takes ``torch.autograd.Function`` apart."""
    # Not tried with those before torch 2.7.
    return is_compiling() and not is_exporting() and hasattr(torch.compiler, 'is_exporting')


def compiles_plans() -> bool:
    """Whether TorchDynamo takes plans of several sizes; that of torch 2.1 fails on them."""
    return hasattr(torch.compiler, 'is_compiling')


def mixes_dtypes(x: Tensor) -> bool:
    """Whether operators with three inputs take tensors of two dtypes; not on a CPU in torch 2.1."""
    return x.is_cuda or hasattr(torch.compiler, 'is_compiling')


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """dtype of autocast on a kind of device; None where it is off."""
    if hasattr(torch, 'get_autocast_dtype'):  # since torch 2.4
        enabled = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type)
    elif device_type == 'cpu':
        enabled, dtype = torch.is_autocast_cpu_enabled(), torch.get_autocast_cpu_dtype()
    else:
        enabled, dtype = torch.is_autocast_enabled(), torch.get_autocast_gpu_dtype()
    return dtype if enabled else None


def has_global_hooks() -> bool:
    """Whether hooks are registered that every module calls."""
    if hasattr(_module, '_has_any_global_hook'):  # since torch 2.2
        return bool(_module._has_any_global_hook())
    return bool(
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )


def is_upstream() -> bool:
    """Whether OpenMMLab's own packages are installed; its maintained fork's have other names."""
    try:
        return bool(version('mmengine'))
    except PackageNotFoundError:
        return False


def extremes(value: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest number of a tensor; NaN wins over any number."""
    try:
        return torch.aminmax(value)
    except RuntimeError:  # float16 on a CPU, in torch 2.1
        return torch.aminmax(value.float())


def fakes_gather() -> bool:
    """Whether fake tensors know the shape of what ``index_select`` writes; not in torch 2.1."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        try:
            torch.index_select(torch.empty(2, 3), 0, torch.zeros(3).long(), out=torch.empty(3, 3))
        except RuntimeError:
            return False
    return True


def flops(packet: OpOverloadPacket, args: Sequence, kwargs: Mapping[str, Any], out: Any) -> int:
    """Floating-point operations of an operator, as PyTorch counts them; 0 for what it does not."""
    from torch.utils import flop_counter

    if hasattr(flop_counter, 'flop_registry'):  # since torch 2.2
        formula = flop_counter.flop_registry.get(packet)
        return 0 if formula is None else formula(*args, **kwargs, out_val=out)
    formula = flop_counter.flop_mapping.get(packet)
    args, kwargs, out = tree_map(lambda x: getattr(x, 'shape', x), (args, dict(kwargs), out))
    return 0 if formula is None else formula(*args, **kwargs, out_shape=out)


def load_mapped(path: Path) -> Any:
    """``torch.load`` of what is to be trusted, with tensors that stay on the disk."""
    # torch 2.1 maps a file that is named by a string alone.
    return torch.load(str(path), 'cpu', weights_only=False, mmap=True)
