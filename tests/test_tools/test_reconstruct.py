"""tools/reconstruct.py: the picture it writes, and how it refuses bad input."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from PIL import Image
from torchvision.models import resnet18

from greenmim_mm.registry import MODELS

REPO = Path(__file__).resolve().parents[2]

CONFIG = """
default_scope = 'mmpretrain'
model = dict(
    type='greenmim_mm.GreenMIM',
    backbone=dict(
        type='greenmim_mm.GreenSwin',
        arch=dict(embed_dims={width}, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)),
        window_size=2,
        img_size=96),
    neck=dict(
        type='greenmim_mm.GreenMIMPretrainDecoder',
        embed_dim=8 * {width},
        decoder_embed_dim=16,
        decoder_num_heads=2),
    head=dict(
        type='MAEPretrainHead',
        norm_pix=True,
        patch_size=32,
        loss=dict(type='PixelReconstructionLoss', criterion='L2')),
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True))
"""


def load_tool():
    path = REPO / 'tools' / 'reconstruct.py'
    spec = importlib.util.spec_from_file_location('reconstruct', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()


@pytest.fixture
def files(tmp_path):
    """Paths of a config, its checkpoint, a folder with two images and the output, by name."""
    config, checkpoint = tmp_path / 'config.py', tmp_path / 'epoch_1.pth'
    config.write_text(CONFIG.format(width=8))
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(Config.fromfile(config).model)
    torch.save(dict(meta=dict(epoch=1), state_dict=model.state_dict(), optimizer={}), checkpoint)
    images = tmp_path / 'images'
    images.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (('a.png', (50, 70, 3)), ('b.jpg', (200, 120, 3))):
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(images / name)
    return dict(config=config, checkpoint=checkpoint, images=images, out=tmp_path / 'out.png')


def run(files, *args, **changes):
    paths = {**files, **changes}
    tool.main(
        [
            *(str(paths[name]) for name in ('config', 'checkpoint', 'images')),
            *('--out', str(paths['out'])),
            *map(str, args),
        ]
    )


def refusal(capsys, files, *args, **changes) -> str:
    """The one line of a refusal."""
    with pytest.raises(SystemExit) as exit_info:
        run(files, *args, **changes)
    assert exit_info.value.code == 2
    out, err = capsys.readouterr()
    assert 'wrote' not in out
    assert err.count('\n') == 1 and err.endswith('\n')
    assert 'error: ' in err
    return err


def test_draws(capsys, files):
    run(files)
    assert 'out.png: 2 images' in capsys.readouterr().out
    first = np.array(Image.open(files['out']))
    assert first.shape[1] == 3 * 96 + 2 * 4
    assert first.shape[0] > 2 * 96 + 4
    # The same seed draws the same picture, another one another.
    run(files, '--force')
    assert np.array_equal(first, np.array(Image.open(files['out'])))
    run(files, '--force', '--seed', 1)
    assert not np.array_equal(first, np.array(Image.open(files['out'])))


def test_options(files):
    run(files, '--size', 64, '--mask-ratio', 0.5, images=files['images'] / 'a.png')
    picture = np.array(Image.open(files['out']))
    assert picture.shape[1] == 3 * 64 + 2 * 4
    masked = picture[-64:, 68:132]
    hidden = (masked == 128).all(axis=-1).reshape(2, 32, 2, 32).all(axis=(1, 3))
    assert hidden.sum() == 2


def test_existing_output(capsys, files):
    files['out'].write_text('precious')
    message = refusal(capsys, files)
    assert str(files['out']) in message and '--force' in message
    assert files['out'].read_text() == 'precious'


def test_bad_images(capsys, files, tmp_path):
    bad = files['images'] / 'c.png'
    bad.write_text('hello')
    assert f'image {bad} cannot be read' in refusal(capsys, files)
    empty = tmp_path / 'empty'
    empty.mkdir()
    assert f'folder {empty} has no images' in refusal(capsys, files, images=empty)
    none = tmp_path / 'none.png'
    assert f'image {none} does not exist' in refusal(capsys, files, images=none)
    assert not files['out'].exists()


@pytest.mark.parametrize(
    'args, reason',
    [
        (['--size', '100'], 'multiples of 32'),
        (['--size', '0'], 'multiples of 32'),
        (['--size', '32'], 'at least 2 mask units'),
        (['--mask-ratio', '0'], 'mask_ratio=0.0 must lie strictly between 0 and 1'),
        (['--mask-ratio', '1'], 'mask_ratio=1.0 must lie strictly between 0 and 1'),
        (['--mask-ratio', 'nan'], 'must lie strictly between 0 and 1'),
        (['--seed', '-1'], 'seed=-1 must not be negative'),
    ],
)
def test_bad_options(capsys, files, args, reason):
    assert reason in refusal(capsys, files, *args)
    assert not files['out'].exists()


def test_bad_output(capsys, files, tmp_path):
    assert 'must end in .png' in refusal(capsys, files, out=tmp_path / 'out.jpg')
    out = tmp_path / 'none' / 'out.png'
    assert f'folder {out.parent} does not exist' in refusal(capsys, files, out=out)


def test_bad_config(capsys, files, tmp_path):
    config = tmp_path / 'none.py'
    assert f'config {config} does not exist' in refusal(capsys, files, config=config)
    for text in (
        'model = dict(',
        'x = 1',
        "model = dict(type='greenmim_mm.Nothing')",
        "model = dict(type='greenmim_mm.GreenMIM', mask_ratio=3)",
    ):
        config.write_text(text)
        assert f'config {config} gives no model' in refusal(capsys, files, config=config)
    config.write_text("model = dict(type='greenmim_mm.GreenSwin')")
    assert 'a GreenSwin, which does not paint' in refusal(capsys, files, config=config)


def test_bad_checkpoint(capsys, files, tmp_path):
    checkpoint = tmp_path / 'none.pth'
    assert 'none.pth does not exist' in refusal(capsys, files, checkpoint=checkpoint)
    num_keys = len(torch.load(files['checkpoint'])['state_dict'])
    data = files['checkpoint'].read_bytes()
    checkpoint.write_bytes(data[: len(data) // 2])
    assert 'is truncated' in refusal(capsys, files, checkpoint=checkpoint)
    torch.save({'state_dict': resnet18().state_dict()}, checkpoint)
    message = refusal(capsys, files, checkpoint=checkpoint)
    assert 'another model' in message and f'0 of {num_keys} keys match' in message


def test_checkpoint_of_another_width(capsys, files, tmp_path):
    config = tmp_path / 'wide.py'
    config.write_text(CONFIG.format(width=16))
    message = refusal(capsys, files, config=config)
    assert 'another model' in message and 'keys match' in message and 'another shape' in message


def test_no_gpu(capsys, monkeypatch, files):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert 'no CUDA device' in refusal(capsys, files, '--device', 'cuda')
