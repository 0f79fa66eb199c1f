"""Random draws that follow from (seed, epoch, index), and epochs that go on in their middle."""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.dataset import DefaultSampler

from ..registry import DATA_SAMPLERS


class Draw(int):
    """Index of an image that knows for which epoch of which run it is drawn.

    It carries both to the worker processes: those that persist have no other way to learn of a
    new epoch.

    Args:
        index: Place in the data set.
        seed: Seed of the run.
        epoch: Epoch, from 0.
        copy: Number of this crop among those of the image in this epoch.
    """

    seed: int
    epoch: int
    copy: int

    def __new__(cls, index: int, seed: int, epoch: int, copy: int = 0) -> 'Draw':
        draw = super().__new__(cls, index)
        draw.seed, draw.epoch, draw.copy = seed, epoch, copy
        return draw

    def __reduce__(self) -> tuple:
        return Draw, (int(self), self.seed, self.epoch, self.copy)

    @property
    def entropy(self) -> tuple[int, ...]:
        """What all random numbers of this image follow from."""
        copy = (self.copy,) if self.copy else ()
        return self.seed, self.epoch, int(self), *copy


@DATA_SAMPLERS.register_module()
class RepeatableSampler(DefaultSampler):
    """mmengine's ``DefaultSampler``, in the same order, whose indices are :class:`Draw`.

    With ``repeats``, an image comes so many times in a row, for as many crops of one decoded image
    (:class:`~greenmim_mm.datasets.LoadRandomResizedCrop` keeps the last one), and only in each
    ``repeats``-th epoch. An epoch keeps its number of images, so that schedules, batches and
    checkpoints stay what they were. Batches should hold a multiple of ``repeats`` images: each is
    made by one worker process. (Augment your batch: Hoffer et al., CVPR 2020.)

    Args:
        *args: The parent's.
        repeats: Crops of an image, one after another.
        **kwargs: The parent's.

    Raises:
        ValueError: If ``repeats`` is no positive whole number.
    """

    _start = 0

    def __init__(self, *args: Any, repeats: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(repeats, int) or isinstance(repeats, bool) or repeats < 1:
            raise ValueError(f'repeats={repeats!r} must be a positive whole number')
        self.repeats = repeats

    def start_at(self, num_samples: int) -> None:
        """Leave out the first samples of this process, in the next epoch alone."""
        self._start = num_samples

    def __iter__(self) -> Iterator[Draw]:
        start, self._start = self._start, 0
        for index, copy in self._indices()[start:]:
            yield Draw(index, self.seed, self.epoch, copy)

    def _indices(self) -> list[tuple[int, int]]:
        """What this process takes of the epoch: indices, each with the number of its crop."""
        epoch = self.epoch
        # Epochs that share one order, of which each takes a part.
        self.epoch, part = divmod(epoch, self.repeats)
        try:
            indices = list(super().__iter__())
        finally:
            self.epoch = epoch
        share = math.ceil(len(indices) / self.repeats)
        # The last part may be the shorter one: it is filled up from the beginning.
        chosen = [indices[k % len(indices)] for k in range(part * share, (part + 1) * share)]
        crops = [(index, copy) for index in chosen for copy in range(self.repeats)]
        return crops[: len(indices)]


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Random numbers of Python, numpy and torch (CPU) that follow from ``entropy`` alone.

    The generators stand as before after the block.
    """
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    words = np.random.SeedSequence(entropy).generate_state(3, np.uint32)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    # Not torch.manual_seed, which would reach the GPUs' generators as well.
    torch.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
