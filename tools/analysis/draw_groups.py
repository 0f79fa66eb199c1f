"""Draws group window attention: the windows of a masked image, their groups, a group's mask.

The picture is computed by the package's own planning, not drawn by hand.

Example:
    python tools/analysis/draw_groups.py docs/images/group_window_attention.png
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from greenmim_mm.cli.errors import Parser
from greenmim_mm.demo.data import DemoDataConfig, draw_scene
from greenmim_mm.demo.scenes import PHOTOGRAPHS, load_digit_pools, load_photographs
from greenmim_mm.ops import (
    as_unit_mask,
    grouped_plan,
    mask_generator,
    random_mask,
    visible_tokens,
    window_grid,
)

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402 - the backend comes first
from matplotlib.patches import Rectangle  # noqa: E402

IMAGE_SIZE = 160
STAGE = 2  # of 0 to 3: a token is 16 pixels wide, a mask unit holds 2x2 of them
WINDOW = 5
MASK_RATIO = 0.6
IMAGE = 13  # of the demo's validation part
MASK_SEED = 34
UNUSED = 0.93  # grey of what is hidden or left empty


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tool."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument('path', type=Path, metavar='PNG', help='file to write')
    args = parser.parse_args(argv)
    if not args.path.parent.is_dir():
        parser.error(f'folder {args.path.parent} does not exist; make it first')
    draw(args.path)


def draw(path: Path) -> None:
    """Draw the four panels: image, windows, groups, the attention mask of a group."""
    units = IMAGE_SIZE // 32
    mask = random_mask(units**2, MASK_RATIO, mask_generator(MASK_SEED, 0, 0))
    tokens = visible_tokens(as_unit_mask(mask, (units, units), 1))[STAGE]
    windows = window_grid(tokens.grid, WINDOW, shifted=True)
    plan = grouped_plan(tokens, windows)
    # Letters in reading order, for the windows that have a visible token.
    ids = np.unique(plan.window[plan.window >= 0])
    letters = dict(zip(ids.tolist(), 'ABCDEFGHI', strict=False))
    palette = plt.get_cmap('tab10')(np.arange(10))
    colours = {window: palette[number] for number, window in enumerate(ids.tolist())}

    figure, grid = plt.subplots(2, 2, figsize=(9.6, 9.2), layout='constrained')
    figure.get_layout_engine().set(hspace=0.06, wspace=0.04)
    _draw_image(grid[0, 0], mask)
    _draw_windows(grid[0, 1], tokens, windows, letters, colours)
    _draw_groups(grid[1, 0], plan, letters, colours)
    _draw_mask(grid[1, 1], plan, letters, colours)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_image(axes, mask) -> None:
    pools = load_digit_pools()
    photographs = {split: load_photographs(names) for split, names in PHOTOGRAPHS.items()}
    _, image, _ = draw_scene(DemoDataConfig(IMAGE_SIZE), 'val', IMAGE, pools, photographs)
    units = IMAGE_SIZE // 32
    hidden = np.kron(mask.reshape(units, units), np.ones((32, 32))).astype(bool)
    axes.imshow(np.where(hidden[..., None], round(255 * UNUSED), image).astype(np.uint8))
    for border in range(32, IMAGE_SIZE, 32):
        axes.axhline(border - 0.5, color='white', linewidth=1)
        axes.axvline(border - 0.5, color='white', linewidth=1)
    axes.set(xticks=[], yticks=[])
    axes.set_title(f'1  units of 32 pixels, {mask.sum()} of {mask.size} hidden', loc='left')


def _draw_windows(axes, tokens, windows, letters, colours) -> None:
    identifiers = windows.window_ids(tokens.coords)
    axes.imshow(np.full((*tokens.grid, 3), UNUSED))
    for (row, column), window in zip(tokens.coords, identifiers, strict=True):
        _draw_slot(axes, column - 0.5, row - 0.5, window, letters, colours)
    for axis, size, shift in zip((0, 1), windows.window, windows.shift, strict=True):
        draw_line = (axes.axhline, axes.axvline)[axis]
        for border in range(shift, tokens.grid[axis], size):
            draw_line(border - 0.5, color='black', linewidth=2)
    axes.set(xticks=[], yticks=[])
    axes.set_title('2  their tokens in shifted windows', loc='left')
    counts = ', '.join(f'{letters[w]} {np.sum(identifiers == w)}' for w in sorted(letters))
    axes.set_xlabel(f'visible tokens: {counts}', fontsize=10)


def _draw_slot(axes, left, top, window, letters, colours) -> None:
    """One token, or an empty slot where ``window`` is negative."""
    window = int(window)
    colour = (UNUSED,) * 3 if window < 0 else 0.45 + 0.55 * colours[window][:3]
    axes.add_patch(Rectangle((left, top), 1, 1, facecolor=colour, edgecolor='white'))
    if window >= 0:
        axes.text(left + 0.5, top + 0.53, letters[window], ha='center', va='center', fontsize=9)


def _draw_groups(axes, plan, letters, colours) -> None:
    groups, size = plan.window.shape
    # As high as wide, so that the panel aligns with the others.
    step = size / groups
    for group in range(groups):
        top = (group + 0.5) * step - 0.5
        for slot in range(size):
            _draw_slot(axes, slot, top, plan.window[group, slot], letters, colours)
        axes.text(0, top - 0.35, f'group {group}', fontsize=10)
    axes.set(xlim=(0, size), ylim=(size, 0), aspect=1)
    axes.set_axis_off()
    unused = int((plan.window < 0).sum())
    left = f'{unused} left empty' if unused else 'none left empty'
    axes.set_title(f'3  packed into {groups} groups of {size} slots, {left}', loc='left')


def _draw_mask(axes, plan, letters, colours) -> None:
    # The group with the most windows shows best what the mask is for.
    group = max(range(len(plan.window)), key=lambda g: len(set(plan.window[g]) - {-1}))
    window = plan.window[group]
    size = len(window)
    allowed = (window[:, None] == window[None]) & (window[:, None] >= 0)
    picture = np.full((size, size, 3), UNUSED)
    for query, key in np.argwhere(allowed):
        picture[query, key] = 0.45 + 0.55 * colours[int(window[query])][:3]
    axes.imshow(picture)
    axes.set_xticks(np.arange(-0.5, size), minor=True)
    axes.set_yticks(np.arange(-0.5, size), minor=True)
    axes.grid(which='minor', color='white', linewidth=0.6)
    axes.tick_params(which='both', length=0)
    names = [letters.get(int(w), '') for w in window]
    axes.set_xticks(range(size), names, fontsize=9)
    axes.set_yticks(range(size), names, fontsize=9)
    axes.set(xlabel='key', ylabel='query')
    axes.spines[:].set_visible(False)
    axes.set_title(f'4  attention in group {group}: own window only', loc='left')


if __name__ == '__main__':
    main()
