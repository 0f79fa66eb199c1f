"""Group window attention in a picture: windows of a masked image, their groups, a group's mask."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..fileio import atomic_path
from ..ops import (
    UNIT_SIZE,
    GroupPlan,
    StageTokens,
    WindowGrid,
    as_unit_mask,
    grouped_plan,
    unit_grid,
    visible_tokens,
    window_grid,
)

_UNUSED = 0.93  # grey of what is hidden or left empty


@dataclass(frozen=True)
class _Labels:
    """Letters of windows in reading order, and their colours (RGB, 0 to 1)."""

    letters: Mapping[int, str]
    colours: Mapping[int, np.ndarray]

    @classmethod
    def of(cls, plan: GroupPlan) -> '_Labels':
        """For the windows that have a visible token."""
        windows = np.unique(plan.window[plan.window >= 0]).tolist()
        names = [*ascii_uppercase, *map(str, range(len(windows)))]
        palette = colormaps['tab10'](np.arange(10))[:, :3]
        return cls(
            dict(zip(windows, names, strict=False)),
            {window: 0.45 + 0.55 * palette[i % 10] for i, window in enumerate(windows)},
        )


def draw_packing(
    image: np.ndarray,
    mask: np.ndarray,
    path: str | Path,
    stage: int = 2,
    window_size: int = 7,
    force: bool = False,
) -> None:
    """Draw four panels by the package's own plan, for the shifted windows of a stage.

    Args:
        image: ``(H, W, 3)`` uint8, sides divisible by 32.
        mask: ``(L,)`` bool, True = masked, units of 32x32 pixels in row-major order.
        path: PNG to write.
        stage: Stage of the network, 0 to 3; its tokens are ``4 << stage`` pixels wide.
        window_size: Side of a window in tokens.
        force: Replace a file that exists.

    Raises:
        ValueError: If the mask does not fit the image.
        FileExistsError: If the file exists, without ``force``.
    """
    hidden = as_unit_mask(mask, unit_grid(*image.shape[:2]), 1)
    tokens = visible_tokens(hidden)[stage]
    windows = window_grid(tokens.grid, window_size, shifted=True)
    plan = grouped_plan(tokens, windows)
    labels = _Labels.of(plan)
    figure = Figure(figsize=(9.6, 9.2), layout='constrained')
    figure.get_layout_engine().set(hspace=0.06, wspace=0.04)
    panels = figure.subplots(2, 2)
    _draw_image(panels[0, 0], image, hidden.hidden.reshape(hidden.grid))
    _draw_windows(panels[0, 1], tokens, windows, labels)
    _draw_groups(panels[1, 0], plan, labels)
    _draw_mask(panels[1, 1], plan, labels)
    with atomic_path(path, force) as temporary:
        figure.savefig(temporary, dpi=100, format='png')


def _draw_image(axes: Axes, image: np.ndarray, hidden: np.ndarray) -> None:
    pixels = np.kron(hidden, np.ones((UNIT_SIZE, UNIT_SIZE))).astype(bool)[..., None]
    axes.imshow(np.where(pixels, round(255 * _UNUSED), image).astype(np.uint8))
    for draw_line, size in zip((axes.axhline, axes.axvline), pixels.shape, strict=False):
        for border in range(UNIT_SIZE, size, UNIT_SIZE):
            draw_line(border - 0.5, color='white', linewidth=1)
    axes.set(xticks=[], yticks=[])
    axes.set_title(f'1  units of 32 pixels, {hidden.sum()} of {hidden.size} hidden', loc='left')


def _draw_windows(axes: Axes, tokens: StageTokens, windows: WindowGrid, labels: _Labels) -> None:
    identifiers = windows.window_ids(tokens.coords)
    axes.imshow(np.full((*tokens.grid, 3), _UNUSED))
    for (row, column), window in zip(tokens.coords, identifiers, strict=True):
        _draw_slot(axes, column - 0.5, row - 0.5, window, labels)
    for draw_line, side in zip((axes.axhline, axes.axvline), tokens.grid, strict=True):
        for border in range(windows.shift, side, windows.window):
            draw_line(border - 0.5, color='black', linewidth=2)
    axes.set(xticks=[], yticks=[])
    axes.set_title('2  their tokens in shifted windows', loc='left')
    counts = (f'{name} {np.sum(identifiers == w)}' for w, name in sorted(labels.letters.items()))
    axes.set_xlabel(f'visible tokens: {", ".join(counts)}', fontsize=10)


def _draw_slot(axes: Axes, left: float, top: float, window: int, labels: _Labels) -> None:
    """One token, or an empty slot where ``window`` is negative."""
    colour = labels.colours.get(int(window), (_UNUSED,) * 3)
    axes.add_patch(Rectangle((left, top), 1, 1, facecolor=colour, edgecolor='white'))
    name = labels.letters.get(int(window), '')
    axes.text(left + 0.5, top + 0.53, name, ha='center', va='center', fontsize=9)


def _draw_groups(axes: Axes, plan: GroupPlan, labels: _Labels) -> None:
    groups, size = plan.window.shape
    # As high as wide, so that the panel aligns with the others.
    step = size / groups
    for group in range(groups):
        top = (group + 0.5) * step - 0.5
        for slot in range(size):
            _draw_slot(axes, slot, top, plan.window[group, slot], labels)
        axes.text(0, top - 0.35, f'group {group}', fontsize=10)
    axes.set(xlim=(0, size), ylim=(size, 0), aspect=1)
    axes.set_axis_off()
    left = f'{int((plan.window < 0).sum()) or "none"} left empty'
    axes.set_title(f'3  packed into {groups} groups of {size} slots, {left}', loc='left')


def _draw_mask(axes: Axes, plan: GroupPlan, labels: _Labels) -> None:
    # The group with the most windows shows best what the mask is for.
    group = max(range(len(plan.window)), key=lambda g: len(set(plan.window[g]) - {-1}))
    window = plan.window[group]
    size = len(window)
    picture = np.full((size, size, 3), _UNUSED)
    for query, key in np.argwhere((window[:, None] == window) & (window[:, None] >= 0)):
        picture[query, key] = labels.colours[int(window[query])]
    axes.imshow(picture)
    axes.set_xticks(np.arange(-0.5, size), minor=True)
    axes.set_yticks(np.arange(-0.5, size), minor=True)
    axes.grid(which='minor', color='white', linewidth=0.6)
    axes.tick_params(which='both', length=0)
    names = [labels.letters.get(int(w), '') for w in window]
    axes.set_xticks(range(size), names, fontsize=9)
    axes.set_yticks(range(size), names, fontsize=9)
    axes.set(xlabel='key', ylabel='query')
    axes.spines[:].set_visible(False)
    axes.set_title(f'4  attention in group {group}: own window only', loc='left')
