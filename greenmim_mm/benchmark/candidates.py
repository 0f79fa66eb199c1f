"""The table of pre-training candidates, and how each is built.

No candidate skips layers at random: mmpretrain's SimMIM has a ``drop_path_rate`` of 0.1 by
default, which takes time and is not part of the method. Weights are as PyTorch makes them, since
their values do not change the work.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..archs import SWIN_ARCHS, SWINV2_ARCHS
from ..models import GreenMIMPretrainDecoder, GreenSwin, GreenSwinV2
from ..ops import UNIT_SIZE, UnitMask, random_mask, take_units, unit_grid


@dataclass(frozen=True)
class Candidate:
    """A way to pre-train.

    Attributes:
        name: Name on the command line.
        group: Candidates of a group are measured in turn; others are held to the first.
        label: What it is, for people.
        build: Makes the model for a candidate. Calling the model with images ``(B, 3, S, S)`` and
            what its ``draw(images)`` returned gives the loss. ``draw`` is what a data loader
            would do and is not timed.
        arch: As the backbone takes it.
        img_size: Side of the images in pixels.
        window_size: Side of the windows in tokens, of Swin.
        batch: Images of a step on a CPU; 32 times as many on CUDA.
        version: 1 or 2, of Swin.
        options: Further arguments of the backbone.
        needs: Packages that the model comes from.
    """

    name: str
    group: str
    label: str
    build: Callable[['Candidate'], nn.Module]
    arch: str | dict
    img_size: int = 224
    window_size: int = 7
    batch: int = 8
    version: int = 1
    options: dict = field(default_factory=dict)
    needs: tuple[str, ...] = ()

    @property
    def window_sizes(self) -> tuple[int, ...]:
        """Window of each stage: no larger than its map."""
        return tuple(min(self.window_size, self.img_size // (4 << stage)) for stage in range(4))


def missing(packages: Sequence[str]) -> str:
    """Why something that needs these packages is skipped; empty if it need not be."""
    for package in packages:
        if find_spec(package) is None:
            return f'skipped: {package} is not installed'
        try:
            import_module(package)
        # OpenMMLab's packages assert the versions of each other.
        except (ImportError, AssertionError) as error:
            reason = str(error).partition('\n')[0]
            return f'skipped: {package} cannot be imported ({reason})'
    return ''


class GreenMIMStep(nn.Module):
    """GreenMIM without mmpretrain: the work of ``GreenMIM.loss`` with a norm_pix L2 head.

    The benchmark always uses this class and not the algorithm for mmpretrain, so that figures do
    not depend on what is installed; a test holds it to the algorithm.
    """

    def __init__(self, candidate: Candidate) -> None:
        super().__init__()
        if candidate.version == 1:
            backbone, window_size = GreenSwin, candidate.window_size
        else:
            backbone, window_size = GreenSwinV2, candidate.window_sizes
        self.backbone = backbone(
            candidate.arch, window_size=window_size, drop_path_rate=0.0, **candidate.options
        )
        self.neck = GreenMIMPretrainDecoder(self.backbone.num_features[-1])
        self.rng = np.random.default_rng(0)

    def draw(self, images: Tensor) -> None:
        """Nothing: masks are drawn, and groups planned, in the step."""

    def mask(self, images: Tensor) -> UnitMask:
        """The mask of the next step: three quarters are hidden."""
        rows, columns = unit_grid(*images.shape[-2:])
        return UnitMask((rows, columns), random_mask(rows * columns, 0.75, self.rng))

    def plan(self, images: Tensor) -> None:
        """Draw a mask and plan a step, as :meth:`forward` does."""
        self.backbone.plan(self.mask(images), images.device)

    def forward(self, images: Tensor, drawn: None = None) -> Tensor:
        """Loss of images ``(B, 3, S, S)``, masks included."""
        return self.masked_loss(images, self.mask(images))

    def masked_loss(self, images: Tensor, mask: UnitMask) -> Tensor:
        """Squared error of the normalised pixels of hidden units."""
        painted = self.neck(self.backbone(images, mask), mask, hidden_only=True)
        # (B, hidden, C, 32, 32) -> (B, hidden, 32 * 32 * C)
        units = take_units(images, mask.hidden_units).permute(0, 1, 3, 4, 2).flatten(2)
        variance, mean = torch.var_mean(units, dim=-1, keepdim=True)
        target = (units - mean) / (variance + 1e-6) ** 0.5
        return F.mse_loss(painted, target)


class PeerStep(nn.Module):
    """An algorithm of mmpretrain."""

    def __init__(self, config: dict, hidden: float | None = None) -> None:
        super().__init__()
        from mmpretrain.registry import MODELS

        self.model = MODELS.build(config)
        self.hidden = hidden

    def draw(self, images: Tensor) -> list | None:
        """Data samples with a mask for each image, where the algorithm wants them.

        32x32 pixel units are hidden, on the grid of patches of 4x4 pixels.
        """
        if self.hidden is None:
            return None
        from mmpretrain.structures import DataSample

        batch, side = len(images), images.shape[-1] // UNIT_SIZE
        ranks = torch.rand(batch, side * side, device=images.device).argsort(1).argsort(1)
        mask = (ranks < self.hidden * side * side).long().view(batch, side, side)
        mask = mask.repeat_interleave(UNIT_SIZE // 4, 1).repeat_interleave(UNIT_SIZE // 4, 2)
        return [DataSample().set_mask(one) for one in mask]

    def forward(self, images: Tensor, drawn: list | None) -> Tensor:
        """Loss of images ``(B, 3, S, S)``."""
        return self.model.loss(images, drawn)['loss']


def simmim(candidate: Candidate) -> PeerStep:
    """SimMIM of mmpretrain, as its recipes have it, six tenths hidden.

    A window shrinks where the map is smaller, as in the paper's code; mmpretrain's recipe for
    Swin-L pads the last map to the window instead, which takes more time and memory. Swin V2 is
    mmpretrain's, too, with mask tokens added to it.
    """
    common = dict(
        arch=candidate.arch, img_size=candidate.img_size, drop_path_rate=0.0, **candidate.options
    )
    if candidate.version == 1:
        windows = [dict(block_cfgs=dict(window_size=size)) for size in candidate.window_sizes]
        backbone = dict(type='SimMIMSwinTransformer', stage_cfgs=windows, **common)
    else:
        backbone = dict(
            type='greenmim_mm.SimMIMSwinTransformerV2', window_size=candidate.window_sizes, **common
        )
    archs = SWIN_ARCHS if candidate.version == 1 else SWINV2_ARCHS
    arch = archs[candidate.arch] if isinstance(candidate.arch, str) else candidate.arch
    width = 8 * arch['embed_dims']
    loss = dict(type='PixelReconstructionLoss', criterion='L1', channel=3)
    parts = dict(
        backbone=backbone,
        neck=dict(type='SimMIMLinearDecoder', in_channels=width, encoder_stride=32),
        head=dict(type='SimMIMHead', patch_size=4, loss=loss),
    )
    return PeerStep(dict(type='SimMIM', **parts), hidden=0.6)


def mae(candidate: Candidate) -> PeerStep:
    """MAE of mmpretrain, as its recipes have it; it draws its masks itself."""
    size = candidate.img_size
    decoder = dict(decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16)
    width = dict(num_patches=(size // 16) ** 2, embed_dim=candidate.arch['embed_dims'])
    loss = dict(type='PixelReconstructionLoss', criterion='L2')
    parts = dict(
        backbone=dict(type='MAEViT', arch=candidate.arch, img_size=size, mask_ratio=0.75),
        neck=dict(type='MAEPretrainDecoder', **width, **decoder),
        head=dict(type='MAEPretrainHead', norm_pix=True, loss=loss),
    )
    for part in parts.values():
        part['patch_size'] = 16
    return PeerStep(dict(type='MAE', **parts))


def swin_group(arch: str, window: int, paper_window: int, batch: int) -> list[Candidate]:
    """GreenMIM, plain, sparing memory and not, and SimMIM at its paper's size and GreenMIM's."""
    title = f'Swin-{arch[0].upper()}'
    ours = dict(build=GreenMIMStep, arch=arch, window_size=window, batch=batch)
    peer = dict(build=simmim, arch=arch, batch=batch, needs=('mmcv', 'mmpretrain'))
    size = f'{title}, 224 px, window {window}'
    lean, rich = f"GreenMIM {size}, with_cp='mlp'", f'GreenMIM {size}, recompute=False'
    paper = f'SimMIM {title}, 192 px, window {paper_window}'
    return [
        Candidate(f'greenmim-{arch}', title, f'GreenMIM {size}', **ours),
        Candidate(f'greenmim-{arch}-mlp', title, lean, options=dict(with_cp='mlp'), **ours),
        Candidate(f'greenmim-{arch}-keep', title, rich, options=dict(recompute=False), **ours),
        Candidate(
            f'simmim-{arch}-192', title, paper, img_size=192, window_size=paper_window, **peer
        ),
        Candidate(f'simmim-{arch}-224', title, f'SimMIM {size}', window_size=window, **peer),
    ]


def swin_v2_group(arch: str, size: int, window: int, batch: int) -> list[Candidate]:
    """GreenMIM, plain, sparing memory and not, and SimMIM, all at one size and window."""
    title = f'Swin V2-{arch[0].upper()}, {size} px'
    label = f'{title}, window {window}'
    common = dict(arch=arch, img_size=size, window_size=window, batch=batch, version=2)
    lean = dict(build=GreenMIMStep, options=dict(with_cp='mlp'), **common)
    rich = dict(build=GreenMIMStep, options=dict(recompute=False), **common)
    peer = dict(build=simmim, needs=('mmcv', 'mmpretrain'), **common)
    name = f'v2{arch}-{size}'
    return [
        Candidate(f'greenmim-{name}', title, f'GreenMIM {label}', build=GreenMIMStep, **common),
        Candidate(f'greenmim-{name}-mlp', title, f"GreenMIM {label}, with_cp='mlp'", **lean),
        Candidate(f'greenmim-{name}-keep', title, f'GreenMIM {label}, recompute=False', **rich),
        Candidate(f'simmim-{name}', title, f'SimMIM {label}', **peer),
    ]


VIT_BASE = dict(embed_dims=768, num_layers=12, num_heads=12, feedforward_channels=3072)

CANDIDATES = [
    *swin_group('tiny', 7, 6, 8),
    *swin_group('base', 7, 6, 8),
    Candidate(
        'mae-base', 'Swin-B', 'MAE ViT-B/16, 224 px', mae, VIT_BASE, needs=('mmcv', 'mmpretrain')
    ),
    *swin_group('large', 14, 12, 4),
    *swin_v2_group('base', 192, 6, 8),
    *swin_v2_group('base', 256, 8, 8),
    *swin_v2_group('large', 192, 12, 4),
]


def select(patterns: Sequence[str] | None) -> list[Candidate]:
    """Candidates whose names match one of the shell-style patterns; all for None.

    Raises:
        ValueError: If a pattern matches nothing.
    """
    for pattern in patterns or ():
        if not any(fnmatchcase(candidate.name, pattern) for candidate in CANDIDATES):
            names = ', '.join(candidate.name for candidate in CANDIDATES)
            raise ValueError(f'--models: no model is named {pattern}; there are {names}')
    return [
        candidate
        for candidate in CANDIDATES
        if patterns is None or any(fnmatchcase(candidate.name, p) for p in patterns)
    ]
