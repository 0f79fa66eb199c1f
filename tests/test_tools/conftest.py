"""The tools as modules, a few images, and a small run on them."""

import importlib.util

import cv2
import numpy as np
import pytest
from tool_runs import ROOT, SMALL_CONFIG, TINY


@pytest.fixture
def tools(monkeypatch):
    """``tools(name)`` imports tools/<name>.py, under a name that hides no other module."""
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))

    def load(name):
        spec = importlib.util.spec_from_file_location(f'tool_{name}', ROOT / f'tools/{name}.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Four images at two depths, no labels."""
    root = tmp_path_factory.mktemp('images')
    (root / 'more' / 'of them').mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ('a.jpg', 'b.PNG', 'more/c.jpeg', 'more/of them/d.jpg'):
        smooth = cv2.resize(rng.integers(0, 256, (5, 5, 3), np.uint8), (120, 100))
        assert cv2.imwrite(str(root / name), smooth)
    return root


@pytest.fixture
def small_config(tmp_path, images):
    path = tmp_path / 'small.py'
    path.write_text(SMALL_CONFIG.format(base=str(TINY), data=str(images)))
    return path
