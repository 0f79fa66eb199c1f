"""Images, one run that nothing has interrupted, and nothing that runs leave behind."""

import signal

import numpy as np
import pytest
from PIL import Image
from small_runs import NUM_IMAGES, AtIteration, config, train


@pytest.fixture(autouse=True)
def signals_restored():
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    AtIteration.actions, AtIteration.losses = {}, {}


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for index in range(NUM_IMAGES):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
        coarse.resize((80, 72), Image.Resampling.BICUBIC).save(root / f'{index}.png')
    return root


@pytest.fixture(scope='session')
def whole(folder, tmp_path_factory):
    """An uninterrupted run: losses and final weights."""
    return train(config(tmp_path_factory.mktemp('whole'), folder))
