"""Small GreenSwins for tests of what other tools do with them: V1 and V2, dense and masked."""

import numpy as np
import torch

from greenmim_mm.models import GreenSwin, GreenSwinV2
from greenmim_mm.ops import UnitMask, random_mask

ARCH = dict(embed_dims=32, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))
GRID = (3, 2)

# Windows of 7 do not fit the maps of 96x64 pixels, so there are padding tokens and shifts.
MODELS = {'v1': GreenSwin, 'v2': GreenSwinV2}


def make(name: str, **kwargs) -> GreenSwin:
    """A network in eval mode whose every parameter is random."""
    torch.manual_seed(0)
    model = MODELS[name](ARCH, window_size=7, pad_small_map=True, drop_path_rate=0.0, **kwargs)
    return randomised(model).eval()


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """No parameter is left at zero or one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def images(batch: int = 2) -> torch.Tensor:
    """``(B, 3, 96, 64)``."""
    return torch.randn(batch, 3, 96, 64, generator=torch.Generator().manual_seed(1))


def mask() -> UnitMask:
    """A mask that hides half of the six units."""
    return UnitMask(GRID, random_mask(6, 0.5, np.random.default_rng(0)))


def run(model: torch.nn.Module, use: str, x: torch.Tensor | None = None) -> torch.Tensor:
    """The last map of the dense use, or the features of the masked use."""
    x = images() if x is None else x
    return model(x)[-1] if use == 'dense' else model(x, mask())
