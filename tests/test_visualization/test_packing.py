"""The picture of group window attention."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from greenmim_mm.ops import random_mask
from greenmim_mm.visualization import draw_packing


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (96, 160, 3), dtype=np.uint8)
    return image, random_mask(15, 0.6, rng)


def test_every_visible_token_stands_in_a_group_and_in_its_window(case, tmp_path, monkeypatch):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda *a, **k: (figures.append(a[0]), save(*a, **k)))
    draw_packing(*case, tmp_path / 'a.png', stage=2, window_size=4)
    windows, groups = ([t.get_text() for t in figures[0].axes[i].texts] for i in (1, 2))
    packed = sorted(text for text in groups if text and not text.startswith('group'))
    assert len(windows) == 6 * 4 and packed == sorted(windows)
    assert 'visible tokens: A' in figures[0].axes[1].get_xlabel()
    width, height = Image.open(tmp_path / 'a.png').size
    assert width == 960 and abs(height - 920) <= 1


def test_bad_input(case, tmp_path):
    image, mask = case
    with pytest.raises(ValueError, match='14'):
        draw_packing(image, mask[:-1], tmp_path / 'a.png')
    (tmp_path / 'a.png').touch()
    with pytest.raises(FileExistsError):
        draw_packing(image, mask, tmp_path / 'a.png')
    assert (tmp_path / 'a.png').stat().st_size == 0
