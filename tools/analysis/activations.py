"""Draws how large activations grow over the depth of a GreenSwin, V1 beside V2.

In Swin V1 every block adds what its branches give, unnormalised, to the residual stream; Swin V2
normalises each branch before it is added (Liu et al., Swin Transformer V2, CVPR 2022).
What that means is measured here: the residual stream behind every block, in networks that
differ in nothing else, before and after some steps of GreenMIM.

Example:
    python tools/make_demo_data.py work_dirs/activations/data --image-size 160
    python tools/analysis/activations.py work_dirs/activations/data/unlabelled --out activations.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from greenmim_mm.cli.errors import Parser, errors_in_one_line

if TYPE_CHECKING:  # the rest is imported where it is used: `--help` is quick without
    from torch import Tensor, nn

# ImageNet's, as in the recipes; RGB.
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
_VERSIONS = {'V1': 'greenmim_mm.GreenSwin', 'V2': 'greenmim_mm.GreenSwinV2'}
_COLOURS = {'V1': 'tab:orange', 'V2': 'tab:green'}


@dataclass(frozen=True)
class Settings:
    """What is trained, and how.

    Raises:
        ValueError: If a value makes no sense; the message names it.
    """

    embed_dims: int = 48  # channels of the first stage
    depths: tuple[int, int, int, int] = (2, 2, 18, 2)  # blocks of each stage
    num_heads: tuple[int, int, int, int] = (2, 4, 8, 16)
    window_size: int = 4  # in tokens
    image_size: int = 128  # in pixels, a multiple of 32
    steps: int = 100  # of AdamW between the two measurements
    batch_size: int = 16
    num_probe: int = 32  # images that activations are measured on; no step trains on them
    lr: float = 1.5e-3  # reached after ``warmup`` steps, linearly, and constant from then on
    warmup: int = 10
    mask_ratio: float = 0.6  # share of 32x32 pixel units that is hidden
    seed: int = 0  # of weights, masks and the order of images, the same for V1 and V2

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
    """Residual stream of one network at one time, an entry for each block."""

    stages: tuple[int, ...]  # from the image to the top
    largest: tuple[float, ...]  # absolute value, over images, tokens and channels
    rms: tuple[float, ...]  # root of the mean square


@dataclass(frozen=True)
class Report:
    """What was measured, by 'V1' and 'V2'."""

    settings: Settings
    before: Mapping[str, Activations]
    after: Mapping[str, Activations]  # after the training
    losses: Mapping[str, tuple[float, ...]]  # of every step


def measure_activations(backbone: nn.Module, images: Tensor) -> Activations:
    """Residual stream behind every block in the dense use.

    Args:
        backbone: GreenSwin or GreenSwinV2; its mode and gradients are left alone.
        images: ``(B, 3, H, W)``, normalised.
    """
    import torch

    largest, rms = [], []

    def note(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        output = output.float()
        largest.append(output.abs().max().item())
        rms.append(output.square().mean().sqrt().item())

    hooks = [block.register_forward_hook(note) for block in backbone.blocks()]
    training = backbone.training
    try:
        with torch.no_grad():
            backbone.eval()(images)
    finally:
        backbone.train(training)
        for hook in hooks:
            hook.remove()
    stages = [stage for stage, depth in enumerate(backbone.depths) for _ in range(depth)]
    return Activations(tuple(stages), tuple(largest), tuple(rms))


def load_images(folder: str | Path, size: int, least: int) -> Tensor:
    """All images of a folder and of its sub-folders, by name, resized and cropped to squares.

    Returns:
        ``(N, 3, size, size)`` float32, RGB, normalised by ImageNet's mean and deviation.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If it has fewer than ``least`` images, or one cannot be read.
    """
    import numpy as np
    import torch

    from greenmim_mm.visualization import find_images, read_image

    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f'folder {folder} does not exist; make images with tools/make_demo_data.py'
        )
    paths = find_images([folder])
    if len(paths) < least:
        raise ValueError(
            f'folder {folder} has {len(paths)} images; {least} are needed: give more, or lower '
            'num_probe and batch_size'
        )
    pixels = np.stack([read_image(path, (size, size)) for path in paths])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
    return (images - mean) / std


def compare_activations(folder: str | Path, settings: Settings) -> Report:
    """Measure V1 and V2, pre-train both with GreenMIM, and measure again.

    Both see the same images in the same order, with the same masks, under the same AdamW. The
    first ``num_probe`` images of the folder are kept for the measurements.
    """
    models = {name: _build(kind, settings) for name, kind in _VERSIONS.items()}
    images = load_images(folder, settings.image_size, settings.num_probe + settings.batch_size)
    probe, rest = images[: settings.num_probe], images[settings.num_probe :]
    before, after, losses = {}, {}, {}
    for name, model in models.items():
        print(f'{name}: {settings.steps} steps')
        before[name] = measure_activations(model.backbone, probe)
        losses[name] = _train(model, rest, settings)
        after[name] = measure_activations(model.backbone, probe)
        print(
            f'{name}: largest activation {max(before[name].largest):.1f}, then '
            f'{max(after[name].largest):.1f}; loss {losses[name][0]:.3f}, then '
            f'{losses[name][-1]:.3f}'
        )
    return Report(settings, before, after, losses)


def _build(kind: str, settings: Settings) -> nn.Module:
    import torch
    from mmengine.logging import MMLogger

    from greenmim_mm.registry import MODELS

    dims = settings.embed_dims
    arch = dict(embed_dims=dims, depths=settings.depths, num_heads=settings.num_heads)
    if kind.endswith('V2'):
        arch['extra_norm_every_n_blocks'] = 0
    loss = dict(type='mmpretrain.PixelReconstructionLoss', criterion='L2')
    backbone = dict(type=kind, arch=arch, drop_path_rate=0.0)
    backbone.update(img_size=settings.image_size, window_size=settings.window_size)
    neck = dict(type='greenmim_mm.GreenMIMPretrainDecoder', embed_dim=8 * dims)
    torch.manual_seed(settings.seed)
    model = MODELS.build(
        dict(
            type='greenmim_mm.GreenMIM',
            backbone=backbone,
            neck=neck | dict(decoder_embed_dim=192, decoder_num_heads=6),
            head=dict(type='mmpretrain.MAEPretrainHead', norm_pix=True, patch_size=32, loss=loss),
            mask_ratio=settings.mask_ratio,
        )
    )
    # How each parameter starts is no news here.
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel('WARNING')
    model.init_weights()
    logger.setLevel(level)
    return model


def _train(model: nn.Module, images: Tensor, settings: Settings) -> tuple[float, ...]:
    """AdamW as the recipes have it: no decay of what is no matrix of a linear map."""
    import torch
    from mmengine.utils import track_iter_progress

    from greenmim_mm.ops import mask_generator, random_mask, unit_grid

    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        table = 'relative_position_bias_table' in name or 'cpb_mlp' in name
        flat = parameter.ndim != 2 and not name.endswith('projection.weight')
        groups[not table and not flat].append(parameter)
    decay = [dict(params=group, weight_decay=0.05 * key) for key, group in groups.items()]
    optimizer = torch.optim.AdamW(decay, lr=settings.lr, betas=(0.9, 0.95))
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


def save_report(report: Report, path: str | Path, force: bool = False) -> None:
    """Write all numbers as JSON."""
    from greenmim_mm.fileio import atomic_path

    with atomic_path(path, force) as temporary:
        temporary.write_text(json.dumps(asdict(report), indent=2) + '\n', encoding='utf-8')


def draw_report(report: Report, path: str | Path, force: bool = False) -> None:
    """Draw activations over depth as PNG: the largest above, the rms below."""
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    from greenmim_mm.fileio import atomic_path

    figure = Figure(figsize=(9, 6), layout='constrained')
    grid = figure.subplots(2, 2, sharex=True, sharey='row')
    moments = {'at initialisation': report.before}
    moments[f'after {report.settings.steps} steps'] = report.after
    grid[0, 0].set_ylabel('largest absolute activation')
    grid[1, 0].set_ylabel('root mean square')
    for column, (title, networks) in zip(grid.T, moments.items(), strict=True):
        column[0].set_title(title)
        column[-1].set_xlabel('block')
        for axes, quantity in zip(column, ('largest', 'rms'), strict=True):
            for name, found in networks.items():
                values = getattr(found, quantity)
                label = _VERSIONS[name].rpartition('.')[2]
                blocks = range(1, len(values) + 1)
                axes.plot(blocks, values, marker='.', color=_COLOURS[name], label=label)
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


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tool; bad input ends it with exit code 2 and one line on stderr."""
    parser = Parser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('images', metavar='FOLDER', help='images to pre-train and to measure on')
    parser.add_argument('--out', metavar='OUT.png', required=True, help='file to write; .json too')
    for name in ('steps', 'batch_size', 'num_probe', 'image_size', 'window_size', 'embed_dims'):
        option = f'--{name.replace("_", "-")}'
        parser.add_argument(option, type=int, metavar='N', default=getattr(Settings, name))
    for name in ('depths', 'num_heads'):
        option, default = f'--{name.replace("_", "-")}', getattr(Settings, name)
        parser.add_argument(option, type=int, nargs=4, metavar='N', default=default)
    parser.add_argument('--lr', type=float, default=Settings.lr, help='learning rate of AdamW')
    parser.add_argument('--seed', type=int, default=Settings.seed)
    parser.add_argument('--force', action='store_true', help='replace files that exist')
    options = vars(parser.parse_args(argv))
    picture, force, folder = (options.pop(name) for name in ('out', 'force', 'images'))
    numbers = Path(picture).with_suffix('.json')
    with errors_in_one_line(parser, OSError, ValueError, ImportError):
        from greenmim_mm.fileio import check_destination
        from greenmim_mm.visualization import check_picture_path

        # Before hours of work, not after.
        settings = Settings(
            **options | {name: tuple(options[name]) for name in ('depths', 'num_heads')}
        )
        check_picture_path(picture, force)
        check_destination(numbers, force)
        report = compare_activations(folder, settings)
        draw_report(report, picture, force)
        save_report(report, numbers, force)
    print(f'wrote {picture} and {numbers}')


if __name__ == '__main__':
    main()
