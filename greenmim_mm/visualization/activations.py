"""How large activations grow over the depth of a GreenSwin, V1 beside V2.

In Swin V1 every block adds what its branches give, unnormalised, to the residual stream; Swin V2
normalises each branch before it is added (Liu et al., Swin Transformer V2, CVPR 2022).
What that means is measured here: the residual stream behind every block, in networks that
differ in nothing else, before and after some steps of GreenMIM.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from mmengine.logging import MMLogger
from mmengine.utils import track_iter_progress
from torch import Tensor, nn

from ..fileio import atomic_path, check_destination
from ..ops import mask_generator, random_mask, unit_grid
from ..registry import MODELS
from .reconstruction import IMAGE_SUFFIXES, read_image

# ImageNet's, as in the recipes; RGB.
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
_VERSIONS = {'V1': 'greenmim_mm.GreenSwin', 'V2': 'greenmim_mm.GreenSwinV2'}
_COLOURS = {'V1': 'tab:orange', 'V2': 'tab:green'}


@dataclass(frozen=True)
class ActivationSettings:
    """What is trained, and how.

    Attributes:
        embed_dims: Channels of the first stage.
        depths: Blocks of each of the four stages.
        num_heads: Attention heads of each stage.
        window_size: Side of the windows in tokens.
        image_size: Side of the images in pixels, a multiple of 32.
        steps: Steps of AdamW between the two measurements.
        batch_size: Images of a step.
        num_probe: Images that activations are measured on. No step trains on them.
        lr: Learning rate, reached after ``warmup`` steps and constant from then on.
        warmup: Steps in which the learning rate rises linearly.
        mask_ratio: Share of 32x32 pixel units that is hidden.
        seed: Seed of weights, masks and the order of images, the same for V1 and V2.

    Raises:
        ValueError: If a value makes no sense; the message names it.
    """

    embed_dims: int = 48
    depths: tuple[int, int, int, int] = (2, 2, 18, 2)
    num_heads: tuple[int, int, int, int] = (2, 4, 8, 16)
    window_size: int = 4
    image_size: int = 128
    steps: int = 100
    batch_size: int = 16
    num_probe: int = 32
    lr: float = 1.5e-3
    warmup: int = 10
    mask_ratio: float = 0.6
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ('steps', 'batch_size', 'num_probe', 'warmup'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} must be at least 1, got {getattr(self, name)}')
        if not self.lr > 0:
            raise ValueError(f'lr must be above 0, got {self.lr}')
        if self.seed < 0:
            raise ValueError(f'seed must be at least 0, got {self.seed}')
        if self.image_size < 64 or self.image_size % 32:
            raise ValueError(
                f'image_size must be a multiple of 32 of at least 64, got {self.image_size}'
            )


@dataclass(frozen=True)
class Activations:
    """Residual stream of one network at one time.

    Attributes:
        stages: Stage of each block, from the image to the top.
        largest: Largest absolute value behind each block, over images, tokens and channels.
        rms: Root of the mean square behind each block.
    """

    stages: tuple[int, ...]
    largest: tuple[float, ...]
    rms: tuple[float, ...]


@dataclass(frozen=True)
class ActivationReport:
    """What :func:`compare_activations` has measured.

    Attributes:
        settings: What was run.
        before: Activations at initialisation, by 'V1' and 'V2'.
        after: Activations after the training.
        losses: Loss of every step.
    """

    settings: ActivationSettings
    before: Mapping[str, Activations]
    after: Mapping[str, Activations]
    losses: Mapping[str, tuple[float, ...]]


@torch.no_grad()
def measure_activations(backbone: nn.Module, images: Tensor) -> Activations:
    """Residual stream behind every block in the dense use.

    Args:
        backbone: GreenSwin or GreenSwinV2; its mode and gradients are left alone.
        images: ``(B, 3, H, W)``, normalised.
    """
    largest, rms = [], []

    def note(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        output = output.float()
        largest.append(output.abs().max().item())
        rms.append(output.square().mean().sqrt().item())

    hooks = [block.register_forward_hook(note) for block in backbone.blocks()]
    training = backbone.training
    try:
        backbone.eval()(images)
    finally:
        backbone.train(training)
        for hook in hooks:
            hook.remove()
    stages = [stage for stage, depth in enumerate(backbone.depths) for _ in range(depth)]
    return Activations(tuple(stages), tuple(largest), tuple(rms))


def load_images(folder: str | Path, size: int, least: int) -> Tensor:
    """All images of a folder, not of its subfolders, by name.

    Args:
        folder: The folder.
        size: Side of the result in pixels; images are resized to cover it and cropped.
        least: Images that are needed.

    Returns:
        ``(N, 3, size, size)`` float32, RGB, normalised by ImageNet's mean and deviation.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If it has fewer than ``least`` images, or one cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f'folder {folder} does not exist; make images with tools/make_demo_data.py'
        )
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if len(paths) < least:
        raise ValueError(
            f'folder {folder} has {len(paths)} images; {least} are needed: give more, or lower '
            'num_probe and batch_size'
        )
    pixels = np.stack([read_image(path, (size, size)) for path in paths])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
    return (images - mean) / std


def compare_activations(
    folder: str | Path,
    settings: ActivationSettings | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> ActivationReport:
    """Measure V1 and V2, pre-train both with GreenMIM, and measure again.

    Both see the same images in the same order, with the same masks, under the same AdamW. The
    first ``num_probe`` images of the folder are kept for the measurements.

    Args:
        folder: Images; those of the demo's ``data/unlabelled`` will do.
        settings: What is trained and how; the defaults if None.
        log: Takes lines of progress.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If it has too few images, or settings do not make a network.
    """
    settings = settings or ActivationSettings()
    models = {name: _build(kind, settings) for name, kind in _VERSIONS.items()}
    images = load_images(folder, settings.image_size, settings.num_probe + settings.batch_size)
    probe, rest = images[: settings.num_probe], images[settings.num_probe :]
    before, after, losses = {}, {}, {}
    for name, model in models.items():
        log(f'{name}: {settings.steps} steps')
        before[name] = measure_activations(model.backbone, probe)
        losses[name] = _train(model, rest, settings)
        after[name] = measure_activations(model.backbone, probe)
        log(
            f'{name}: largest activation {max(before[name].largest):.1f}, then '
            f'{max(after[name].largest):.1f}; loss {losses[name][0]:.3f}, then '
            f'{losses[name][-1]:.3f}'
        )
    return ActivationReport(settings, before, after, losses)


def _build(kind: str, settings: ActivationSettings) -> nn.Module:
    arch = dict(
        embed_dims=settings.embed_dims, depths=settings.depths, num_heads=settings.num_heads
    )
    if kind.endswith('V2'):
        arch['extra_norm_every_n_blocks'] = 0
    torch.manual_seed(settings.seed)
    model = MODELS.build(
        dict(
            type='greenmim_mm.GreenMIM',
            backbone=dict(
                type=kind,
                arch=arch,
                img_size=settings.image_size,
                window_size=settings.window_size,
                drop_path_rate=0.0,
            ),
            neck=dict(
                type='greenmim_mm.GreenMIMPretrainDecoder',
                embed_dim=8 * settings.embed_dims,
                decoder_embed_dim=192,
                decoder_num_heads=6,
            ),
            head=dict(
                type='mmpretrain.MAEPretrainHead',
                norm_pix=True,
                patch_size=32,
                loss=dict(type='mmpretrain.PixelReconstructionLoss', criterion='L2'),
            ),
            mask_ratio=settings.mask_ratio,
        )
    )
    # A window that does not suit its map shows before images are read.
    unit_count = (settings.image_size // 32,) * 2
    for stage in range(4):
        model.backbone._check_map(stage, tuple(side << (3 - stage) for side in unit_count))
    # How each parameter starts is no news here.
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel('WARNING')
    model.init_weights()
    logger.setLevel(level)
    return model


def _train(model: nn.Module, images: Tensor, settings: ActivationSettings) -> tuple[float, ...]:
    """AdamW as the recipes have it: no decay of what is no matrix of a linear map."""
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        table = 'relative_position_bias_table' in name or 'cpb_mlp' in name
        flat = parameter.ndim != 2 and not name.endswith('projection.weight')
        groups[not table and not flat].append(parameter)
    optimizer = torch.optim.AdamW(
        [
            dict(params=parameters, weight_decay=0.05 * decayed)
            for decayed, parameters in groups.items()
        ],
        lr=settings.lr,
        betas=(0.9, 0.95),
    )
    order = torch.Generator().manual_seed(settings.seed)
    grid = unit_grid(settings.image_size, settings.image_size)
    losses = []
    model.train()
    for step in track_iter_progress(range(settings.steps)):
        for group in optimizer.param_groups:
            group['lr'] = settings.lr * min(1, (step + 1) / settings.warmup)
        batch = images[torch.randperm(len(images), generator=order)[: settings.batch_size]]
        rng = mask_generator(settings.seed, 0, step, 0)
        mask = random_mask(grid[0] * grid[1], settings.mask_ratio, rng)
        loss = model.masked_loss(batch, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return tuple(losses)


def save_report(report: ActivationReport, path: str | Path, force: bool = False) -> None:
    """Write all numbers as JSON.

    Raises:
        FileExistsError: If the file exists and ``force`` is not set.
    """
    with atomic_path(path, force) as temporary:
        temporary.write_text(json.dumps(asdict(report), indent=2) + '\n', encoding='utf-8')


def draw_report(report: ActivationReport, path: str | Path, force: bool = False) -> None:
    """Draw activations over depth as PNG: the largest above, the rms below.

    Args:
        report: What was measured.
        path: PNG to write.
        force: Whether to replace it.

    Raises:
        FileExistsError: If the file exists and ``force`` is not set.
    """
    # An extra of the demo: nothing else here needs it.
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(9, 6), layout='constrained')
    grid = figure.subplots(2, 2, sharex=True, sharey='row')
    moments = {
        'at initialisation': report.before,
        f'after {report.settings.steps} steps': report.after,
    }
    for axes, label in zip(
        grid[:, 0], ('largest absolute activation', 'root mean square'), strict=True
    ):
        axes.set_ylabel(label)
    for column, (title, networks) in zip(grid.T, moments.items(), strict=True):
        column[0].set_title(title)
        column[-1].set_xlabel('block')
        for axes, quantity in zip(column, ('largest', 'rms'), strict=True):
            for name, found in networks.items():
                values = getattr(found, quantity)
                blocks = range(1, len(values) + 1)
                axes.plot(
                    blocks,
                    values,
                    marker='.',
                    color=_COLOURS[name],
                    label=_VERSIONS[name].rpartition('.')[2],
                )
            for edge in np.flatnonzero(np.diff(found.stages)):
                axes.axvline(edge + 1.5, color='0.75', linewidth=0.8, linestyle='--')
            axes.set_yscale('log')
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter('{x:g}')
            axes.yaxis.set_minor_locator(NullLocator())
            axes.grid(alpha=0.3, axis='y')
            axes.spines[['top', 'right']].set_visible(False)
    grid[0, 0].legend(frameon=False)
    with atomic_path(path, force) as temporary:
        figure.savefig(temporary, dpi=120, format='png')


def check_outputs(paths: Sequence[str | Path], force: bool) -> None:
    """Raise ``OSError`` if a file cannot be written; before hours of work, not after."""
    for path in paths:
        check_destination(path, force)
