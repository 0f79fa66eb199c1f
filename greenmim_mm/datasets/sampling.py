"""Random draws that follow from (seed, epoch, index), and epochs that go on in their middle."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

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
    """

    seed: int
    epoch: int

    def __new__(cls, index: int, seed: int, epoch: int) -> 'Draw':
        draw = super().__new__(cls, index)
        draw.seed, draw.epoch = seed, epoch
        return draw

    def __reduce__(self) -> tuple:
        return Draw, (int(self), self.seed, self.epoch)

    @property
    def entropy(self) -> tuple[int, int, int]:
        """What all random numbers of this image follow from."""
        return self.seed, self.epoch, int(self)


@DATA_SAMPLERS.register_module()
class RepeatableSampler(DefaultSampler):
    """mmengine's ``DefaultSampler``, in the same order, whose indices are :class:`Draw`.

    Arguments are the parent's.
    """

    _start = 0

    def start_at(self, num_samples: int) -> None:
        """Leave out the first samples of this process, in the next epoch alone."""
        self._start = num_samples

    def __iter__(self) -> Iterator[Draw]:
        start, self._start = self._start, 0
        for index in list(super().__iter__())[start:]:
            yield Draw(index, self.seed, self.epoch)


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
