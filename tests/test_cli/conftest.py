"""Photographs, and one run of the command that many tests look at."""

import pytest
from command_runs import OPTIONS, command
from PIL import Image
from skimage import data


@pytest.fixture(scope='session')
def photos(tmp_path_factory):
    """Twelve pieces of photographs in two folders, and a file that is no image."""
    root = tmp_path_factory.mktemp('data') / 'photos'
    (root / 'more').mkdir(parents=True)
    astronaut, cat = data.astronaut(), data.chelsea()
    for number in range(6):
        top, left = 100 * (number // 3), 100 * (number % 3)
        piece = astronaut[top : top + 100, left : left + 120]
        Image.fromarray(piece).save(root / f'a{number}.jpg', quality=90)
        Image.fromarray(cat[top : top + 90, left : left + 100]).save(root / f'more/c{number}.png')
    (root / 'readme.md').write_text('no image')
    return root


@pytest.fixture(scope='session')
def finished(photos, tmp_path_factory):
    """A run of four epochs of three steps that nothing has interrupted."""
    out = tmp_path_factory.mktemp('runs') / 'run'
    command('pretrain', photos, '--out', out, '--epochs', 4, *OPTIONS)
    return out
