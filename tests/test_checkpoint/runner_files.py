"""What tests of files share: a small network, its weights, and a pickle that calls something."""

import torch

from greenmim_mm.models import GreenMIM, GreenSwin

ARCH = dict(embed_dims=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4))


def tiny_swin(**changes) -> GreenSwin:
    return GreenSwin(**{**dict(arch=ARCH, window_size=2), **changes})


def tiny_model() -> GreenMIM:
    return GreenMIM(
        backbone=dict(type='greenmim_mm.GreenSwin', arch=ARCH, window_size=2, img_size=64),
        neck=dict(
            type='greenmim_mm.GreenMIMPretrainDecoder',
            embed_dim=64,
            decoder_embed_dim=16,
            decoder_num_heads=2,
        ),
        head=dict(
            type='mmpretrain.MAEPretrainHead',
            patch_size=32,
            loss=dict(type='mmpretrain.PixelReconstructionLoss', criterion='L2'),
        ),
        data_preprocessor=dict(type='mmpretrain.SelfSupDataPreprocessor'),
    )


def snapshot(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_same(module, values):
    for key, value in module.state_dict().items():
        assert torch.equal(value, values[key]), key


class Payload:
    """Pickles to a call of ``function``."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call
