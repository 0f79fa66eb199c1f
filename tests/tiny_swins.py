"""Tiny Swins with random weights, as state dicts and files."""

from pathlib import Path

import torch
from torch import Tensor, nn

from greenmim_mm.models import GreenMIMPretrainDecoder, GreenSwin, GreenSwinV2

ARCH = dict(embed_dims=8, depths=(2, 1, 2, 1), num_heads=(1, 2, 2, 4))
WINDOW = 2


def randomised(module: nn.Module) -> nn.Module:
    """Every parameter random: zeros and ones would hide a wrong order."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(mean=float('norm' in name and name.endswith('weight')), std=0.3)
    return module


def green_swin(version: int = 1, **changes) -> nn.Module:
    """A random GreenSwin."""
    if version == 2:
        arch = dict(ARCH, extra_norm_every_n_blocks=0)
        return randomised(GreenSwinV2(**{**dict(arch=arch, window_size=WINDOW), **changes}))
    return randomised(GreenSwin(**{**dict(arch=ARCH, window_size=WINDOW), **changes}))


def pretrained_weights(version: int = 1, **changes) -> dict[str, Tensor]:
    """What GreenMIM pre-training writes: the backbone and the decoder."""
    torch.manual_seed(0)
    backbone = green_swin(version, **changes)
    decoder = randomised(GreenMIMPretrainDecoder(64, 16, decoder_depth=1, decoder_num_heads=2))
    return {
        **{'backbone.' + key: value for key, value in backbone.state_dict().items()},
        **{'neck.' + key: value for key, value in decoder.state_dict().items()},
    }


def pretrained_file(folder: Path, name: str = 'epoch_3.pth', version: int = 1, **changes) -> Path:
    """A file like those of mmengine's runner."""
    path = folder / name
    torch.save(
        dict(meta=dict(epoch=3), state_dict=pretrained_weights(version, **changes), optimizer={}),
        path,
    )
    return path
