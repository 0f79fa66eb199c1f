"""Pictures from the study's own networks: what they paint at several steps, what they find."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image

from greenmim_mm.demo.report import draw_detections
from greenmim_mm.ops import UNIT_SIZE, mask_generator, random_mask

from .data import MEAN, STD, normalise, read_boxes
from .design import Cell, Study
from .pretrain import build_model, milestone_path, milestone_steps
from .report import TITLES
from .results import Places

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402 - the backend comes first

_SHOWN = (2, 9, 17, 23, 30, 36)  # of the reported split; chosen before any network was trained
_MASK_SEED = 1


def draw_pictures(study: Study, places: Places, folder: Path) -> list[Path]:
    """Draw what there are networks for, in this machine's state.

    Returns:
        The files written.
    """
    written = []
    cell = Cell('pretrain', 'greenmim', study.detect.pretrained_seed)
    steps = [
        step
        for step in milestone_steps(study, cell.start, study.lengths[-1])
        if milestone_path(study, places, cell.start, cell.seed, step).exists()
    ]
    if steps:
        path = folder / 'evidence_reconstructions.png'
        draw_reconstructions(study, places, cell, steps, path)
        written.append(path)
    found = {}
    for start in ('scratch', 'greenmim'):
        for length in study.lengths:  # the longest that was run
            detector = Cell('detect', start, study.seeds[0], 100, length=length)
            results = places.folder(study, detector) / 'val.segm.json'
            if results.exists():
                found[f'{TITLES[start]}, 100 labels'] = results
    if len(found) == 2:
        path = folder / 'evidence_detections.png'
        coco = places.data(study) / 'labelled/coco'
        draw_detections(coco / 'annotations/instances_val.json', coco / 'val', found, path, 8)
        written.append(path)
    return written


def draw_reconstructions(
    study: Study, places: Places, cell: Cell, steps: Sequence[int], path: Path
) -> None:
    """Images, what is visible of them, and what the network paints after each number of steps."""
    images, _, _ = read_boxes(places.data(study), 'val', max(_SHOWN) + 1)
    images = images[list(_SHOWN)]
    masks = [
        random_mask(
            (study.data.image_size // UNIT_SIZE) ** 2,
            study.pretrain.mask_ratio,
            mask_generator(_MASK_SEED, 0, number),
        )
        for number in range(len(images))
    ]
    columns = {'original': images, 'visible': _hide(images, masks)}
    model = build_model(study, cell.start).eval()
    for step in steps:
        state = torch.load(
            milestone_path(study, places, cell.start, cell.seed, step), weights_only=True
        )
        model.load_state_dict(state['state_dict'])
        columns[f'step {step:,}'] = np.stack(
            [paint(model, image, mask) for image, mask in zip(images, masks, strict=True)]
        )
    figure, grid = plt.subplots(
        len(images),
        len(columns),
        figsize=(1.35 * len(columns), 1.37 * len(images) + 0.25),
        layout='constrained',
    )
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, hspace=0.0, wspace=0.0)
    for column, (title, pictures) in enumerate(columns.items()):
        grid[0, column].set_title(title, fontsize=10)
        for axes, picture in zip(grid[:, column], pictures, strict=True):
            axes.imshow(picture)
            axes.set_axis_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    # Noise compresses badly: a palette takes four tenths of the bytes, and the eye sees no less.
    Image.open(path).convert('RGB').quantize(256).save(path, optimize=True)


@torch.no_grad()
def paint(model: torch.nn.Module, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """An image, uint8 ``(H, W, 3)``, with its hidden units as the network paints them."""
    rows, columns = (side // UNIT_SIZE for side in image.shape[:2])
    painted = model.reconstruct(normalise(image[None]), mask)[0]
    painted = painted.reshape(rows, columns, UNIT_SIZE, UNIT_SIZE, 3).transpose(1, 2)
    painted = painted.reshape(image.shape).numpy() * STD + MEAN
    hidden = _pixels(mask, rows, columns)
    return np.where(hidden, painted.clip(0, 255), image).astype(np.uint8)


def _hide(images: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
    rows, columns = (side // UNIT_SIZE for side in images.shape[1:3])
    hidden = np.stack([_pixels(mask, rows, columns) for mask in masks])
    return np.where(hidden, 200, images).astype(np.uint8)


def _pixels(mask: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """A mask of units as one of pixels, ``(H, W, 1)``."""
    unit = np.ones((UNIT_SIZE, UNIT_SIZE), dtype=bool)
    return np.kron(mask.reshape(rows, columns), unit)[..., None]
