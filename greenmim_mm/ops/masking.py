"""Which mask units of an image are hidden.

A mask is boolean with **True = masked (hidden)**, one entry per mask unit in row-major order. It
is checked once, where it enters, and travels as a :class:`UnitMask` from there on.
"""

from dataclasses import dataclass
from functools import cached_property
from numbers import Real

import numpy as np
import torch

UNIT_SIZE = 32
"""Side of a mask unit in pixels: the stride of the last stage, so no stage splits a unit."""


@dataclass(frozen=True, eq=False)
class UnitMask:
    """A checked mask, one for all images of a batch; made by :func:`as_unit_mask`.

    Attributes:
        grid: Mask units ``(rows, columns)`` of the image.
        hidden: ``(L,)`` bool, True = masked, ``L = rows * columns``.
    """

    grid: tuple[int, int]
    hidden: np.ndarray

    @cached_property
    def visible_units(self) -> np.ndarray:
        """``(num_visible,)`` int64, row-major numbers of the units that are seen."""
        return np.flatnonzero(~self.hidden)

    @cached_property
    def hidden_units(self) -> np.ndarray:
        """``(num_hidden,)`` int64, row-major numbers of the units that are not."""
        return np.flatnonzero(self.hidden)


def unit_grid(height: int, width: int) -> tuple[int, int]:
    """Mask units ``(rows, columns)`` of an image of ``height`` x ``width`` pixels.

    Raises:
        ValueError: If a side is not a positive multiple of 32.
    """
    if min(height, width) < UNIT_SIZE or height % UNIT_SIZE or width % UNIT_SIZE:
        raise ValueError(
            f'image of {height}x{width} pixels: with a mask, height and width must be multiples '
            f'of {UNIT_SIZE}; resize or pad the images'
        )
    return height // UNIT_SIZE, width // UNIT_SIZE


def random_mask(num_units: int, mask_ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Hide a fixed number of mask units, chosen uniformly (as MAE and GreenMIM do).

    Args:
        num_units: Number of mask units ``L`` of an image, at least 2.
        mask_ratio: Share of units to hide, in ``(0, 1)``. ``floor(L * (1 - mask_ratio))`` units
            stay visible, but never none and never all.
        rng: Source of randomness.

    Returns:
        ``(L,)`` bool, True = masked.

    Raises:
        ValueError: For fewer than two units or a ratio outside ``(0, 1)``.
    """
    check_mask_ratio(mask_ratio)
    if num_units < 2:
        raise ValueError(
            f'num_units={num_units}: an image needs at least 2 mask units so that one can be '
            'hidden and one be seen; use larger images'
        )
    # The epsilon keeps 10 * (1 - 0.9) at 1 in spite of binary fractions.
    num_visible = int(num_units * (1 - mask_ratio) + 1e-6)
    num_visible = min(max(num_visible, 1), num_units - 1)
    mask = np.ones(num_units, dtype=bool)
    mask[rng.permutation(num_units)[:num_visible]] = False
    return mask


def check_mask_ratio(mask_ratio: float) -> None:
    """Raise ``ValueError`` unless ``0 < mask_ratio < 1``, ``TypeError`` if it is no number."""
    if not isinstance(mask_ratio, Real):
        raise TypeError(f'mask_ratio={mask_ratio!r} must be a number, e.g. 0.75')
    if not 0 < mask_ratio < 1:
        raise ValueError(
            f'mask_ratio={mask_ratio} must lie strictly between 0 and 1; 0.75 is the usual choice'
        )


def mask_generator(seed: int, rank: int, iteration: int, call: int = 0) -> np.random.Generator:
    """Random generator of one forward pass: the same arguments give the same masks.

    Args:
        seed: Seed of the run.
        rank: Rank of the process, so that processes draw different masks.
        iteration: Training iteration, so that a resumed run continues with the same masks.
        call: Number of the forward pass inside the iteration.
    """
    return np.random.default_rng([seed, rank, iteration, call])


def as_unit_mask(
    mask: UnitMask | torch.Tensor | np.ndarray,
    grid: tuple[int, int],
    batch_size: int | None = None,
) -> UnitMask:
    """Check a mask.

    Args:
        mask: Bool, True = masked, of shape ``(L,)``, ``(1, L)`` or ``(B, L)``. A CUDA tensor is
            copied to the CPU, which waits for the device; give a CPU tensor to avoid that. A
            :class:`UnitMask` comes back as it is.
        grid: Mask units ``(rows, columns)`` of the image; ``L = rows * columns``.
        batch_size: Number of images ``B`` that the mask is for; unchecked if None.

    Raises:
        TypeError: If ``mask`` is not a boolean tensor or array.
        ValueError: If its shape does not fit, its rows differ, or nothing is visible.
    """
    rows, columns = grid
    if isinstance(mask, UnitMask):
        if mask.grid != (rows, columns):
            raise ValueError(
                f'the mask is for {mask.grid[0]} x {mask.grid[1]} mask units, the image has '
                f'{rows} x {columns}; make it for the grid of the image'
            )
        return mask
    num_units = rows * columns
    if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:
        # Inside transforms of torch.func nothing has a numpy(), not even what they do not touch.
        try:
            mask = np.array(mask.tolist(), dtype=np.bool_).reshape(mask.shape)
        except RuntimeError:
            # Those of torch 2.1; any other fault is not about transforms.
            if torch._C._functorch.peek_interpreter_stack() is None:
                raise
            raise ValueError(
                'a transform hides the values of the mask; give a UnitMask or a numpy array'
            ) from None
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
        found = getattr(mask, 'dtype', type(mask).__name__)
        raise TypeError(
            f'mask must be a bool tensor with True = masked, not {found}; convert it, e.g. '
            'mask.bool()'
        )
    if mask.ndim not in (1, 2) or mask.shape[-1] != num_units:
        raise ValueError(
            f'mask has shape {mask.shape}, but the image has {rows} x {columns} mask units of '
            f'{UNIT_SIZE}x{UNIT_SIZE} pixels: give ({num_units},), (1, {num_units}) or '
            f'(B, {num_units})'
        )
    if mask.ndim == 2:
        if mask.shape[0] == 0 or (batch_size is not None and mask.shape[0] not in (1, batch_size)):
            raise ValueError(
                f'mask has {mask.shape[0]} rows for a batch of {batch_size} images; give one row '
                'or one per image'
            )
        if (mask != mask[:1]).any():
            raise ValueError(
                'the rows of mask differ: a mask per image is not supported yet; give all '
                'images of the batch the same mask'
            )
        mask = mask[0]
    if mask.all():
        raise ValueError(f'mask hides all {num_units} units; leave at least one visible (False)')
    return UnitMask((rows, columns), mask)
