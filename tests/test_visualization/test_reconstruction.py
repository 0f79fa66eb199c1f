"""Panels of masked images, and the picture made of them."""

import numpy as np
import pytest
import torch
from PIL import Image

from greenmim_mm.models import GreenMIM
from greenmim_mm.visualization import (
    find_images,
    panel_titles,
    read_image,
    reconstruct_files,
    reconstruction_panels,
    save_reconstructions,
)
from greenmim_mm.visualization.reconstruction import from_units, to_units

MEAN, STD = [120.0, 110.0, 100.0], [60.0, 50.0, 40.0]


def tiny_model(norm_pix: bool = True, **preprocessor) -> GreenMIM:
    torch.manual_seed(0)
    return GreenMIM(
        backbone=dict(
            type='greenmim_mm.GreenSwin',
            arch=dict(embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)),
            window_size=2,
            img_size=(64, 96),
        ),
        neck=dict(
            type='greenmim_mm.GreenMIMPretrainDecoder',
            embed_dim=64,
            decoder_embed_dim=16,
            decoder_num_heads=2,
        ),
        head=dict(
            type='mmpretrain.MAEPretrainHead',
            norm_pix=norm_pix,
            patch_size=32,
            loss=dict(type='mmpretrain.PixelReconstructionLoss', criterion='L2'),
        ),
        data_preprocessor=dict(type='mmpretrain.SelfSupDataPreprocessor', **preprocessor),
    )


def random_images(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)


PREPROCESSORS = [
    dict(mean=MEAN, std=STD, bgr_to_rgb=True),
    dict(mean=MEAN, std=STD, to_rgb=True),
    dict(mean=MEAN, std=STD),
    dict(),
]


@pytest.mark.parametrize('preprocessor', PREPROCESSORS)
@pytest.mark.parametrize('norm_pix', [True, False])
def test_perfect_model_paints_the_original(monkeypatch, norm_pix, preprocessor):
    """A model that predicts its own training target must give the image back."""
    model = tiny_model(norm_pix, **preprocessor)
    images = random_images(2, 64, 64)
    mask = np.array([True, False, True, True])
    inputs = []

    def perfect(x, unit_mask):
        inputs.append(x)
        assert np.array_equal(unit_mask.hidden, mask)
        return model.head.construct_target(x)

    monkeypatch.setattr(model, 'reconstruct', perfect)
    original, masked, painted = reconstruction_panels(model, images, mask)
    assert np.array_equal(original, images)
    assert np.array_equal(painted, images)
    # And what the model was given is what OpenMMLab's loader and the preprocessor would give.
    swap = 'bgr_to_rgb' in preprocessor or 'to_rgb' in preprocessor
    seen = torch.from_numpy((images if swap else images[..., ::-1]).copy()).permute(0, 3, 1, 2)
    expected = seen.float()
    if 'mean' in preprocessor:
        expected = (expected - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(inputs[0], expected)


@pytest.mark.parametrize('norm_pix', [True, False])
def test_panels_against_loops(norm_pix):
    model = tiny_model(norm_pix, mean=MEAN, std=STD, bgr_to_rgb=True).eval()
    images = random_images(2, 64, 96)
    mask = np.array([False, True, True, True, True, False])
    panels = reconstruction_panels(model, images, torch.from_numpy(mask))
    for panel in panels:
        assert panel.shape == images.shape and panel.dtype == np.uint8
    original, masked, painted = panels
    assert np.array_equal(original, images)

    x = torch.from_numpy(images).permute(0, 3, 1, 2).double()
    x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        prediction = model.reconstruct(x.float(), mask).double()
    for batch in range(2):
        for unit in range(6):
            row, column = divmod(unit, 3)
            place = (
                batch,
                slice(32 * row, 32 * row + 32),
                slice(32 * column, 32 * column + 32),
            )
            if not mask[unit]:
                assert np.array_equal(masked[place], images[place])
                assert np.array_equal(painted[place], images[place])
                continue
            assert len(np.unique(masked[place])) == 1
            patch = prediction[batch, unit].reshape(32, 32, 3)
            if norm_pix:
                truth = x[batch, :, place[1], place[2]]
                patch = patch * (truth.var() + 1e-6).sqrt() + truth.mean()
            patch = patch * torch.tensor(STD) + torch.tensor(MEAN)
            expected = patch.clamp(0, 255).numpy()
            # A rounded value is off by half a grey level, and float32 by very little.
            assert np.abs(painted[place] - expected).max() < 0.51
            assert painted[place].std() > 0


def test_hidden_pixels_have_no_influence():
    """Without norm_pix nothing of a hidden unit reaches the painted image."""
    model = tiny_model(False, mean=MEAN, std=STD, bgr_to_rgb=True)
    images = random_images(1, 64, 64)
    mask = np.array([True, False, False, True])
    changed = images.copy()
    changed[:, :32, :32] = 7
    first, second = (reconstruction_panels(model, x, mask)[2] for x in (images, changed))
    assert np.array_equal(first, second)


@pytest.mark.parametrize('training', [True, False])
def test_mode_and_gradients_are_left_alone(training):
    model = tiny_model(mean=MEAN, std=STD).train(training)
    reconstruction_panels(model, random_images(1, 64, 64), np.array([True, False, True, True]))
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    'images, mask, error, message',
    [
        (np.zeros((1, 64, 64, 3)), np.zeros(4, bool), TypeError, 'must be a uint8 array'),
        ([1], np.zeros(4, bool), TypeError, 'must be a uint8 array, not list'),
        (np.zeros((64, 64, 3), np.uint8), np.zeros(4, bool), ValueError, 'give .B, H, W, 3.'),
        (np.zeros((1, 60, 64, 3), np.uint8), np.zeros(4, bool), ValueError, 'multiples of 32'),
        (np.zeros((1, 64, 64, 3), np.uint8), np.zeros(5, bool), ValueError, 'mask has shape'),
        (np.zeros((1, 64, 64, 3), np.uint8), np.zeros(4), TypeError, 'must be a bool'),
        (np.zeros((1, 64, 64, 3), np.uint8), np.ones(4, bool), ValueError, 'hides all'),
    ],
)
def test_panels_refuse(images, mask, error, message):
    with pytest.raises(error, match=message):
        reconstruction_panels(tiny_model(), images, mask)


def test_units_are_the_heads_patches():
    images = torch.rand(2, 3, 96, 96)
    units = to_units(images)
    assert torch.equal(units, tiny_model().head.patchify(images))
    assert torch.equal(from_units(units, (3, 3)), images)
    wide = torch.rand(2, 3, 32, 96)
    assert torch.equal(from_units(to_units(wide), (1, 3)), wide)


def test_reconstruct_files(tmp_path):
    paths = []
    for index, size in enumerate([(50, 70), (300, 200)]):
        paths.append(tmp_path / f'{index}.png')
        Image.fromarray(random_images(1, *size)[0]).save(paths[-1])
    model = tiny_model(mean=MEAN, std=STD)
    panels = reconstruct_files(model, paths, seed=3)
    assert [panel.shape for panel in panels] == [(2, 64, 96, 3)] * 3  # the backbone's img_size
    again = reconstruct_files(model, paths, seed=3)
    other = reconstruct_files(model, paths, seed=4)
    assert all(np.array_equal(a, b) for a, b in zip(panels, again, strict=True))
    assert np.array_equal(panels[0], other[0]) and not np.array_equal(panels[1], other[1])
    painted = reconstruct_files(model, paths, 128, mask_ratio=0.5)
    hidden = (painted[1] == 128).all(axis=-1).reshape(2, 4, 32, 4, 32).all(axis=(2, 4))
    assert hidden.sum(axis=(1, 2)).tolist() == [8, 8]
    assert not np.array_equal(hidden[0], hidden[1])  # a mask of its own for each image
    with pytest.raises(ValueError, match='paths is empty'):
        reconstruct_files(model, [])


def test_find_images(tmp_path):
    for name in ('b.PNG', 'a.jpg', 'notes.txt', 'c.webp'):
        (tmp_path / name).touch()
    (tmp_path / 'empty').mkdir()
    found = find_images([tmp_path / 'c.webp', tmp_path])
    assert [path.name for path in found] == ['c.webp', 'a.jpg', 'b.PNG', 'c.webp']
    with pytest.raises(FileNotFoundError, match='empty has no images'):
        find_images([tmp_path / 'empty'])
    with pytest.raises(FileNotFoundError, match='none.png does not exist'):
        find_images([tmp_path / 'none.png'])


def test_read_image_covers_and_crops(tmp_path):
    path = tmp_path / 'wide.png'
    image = np.zeros((10, 40, 3), np.uint8)
    image[:, 15:25] = (200, 100, 50)  # the middle quarter is what a square crop keeps
    Image.fromarray(image).save(path)
    read = read_image(path, (64, 64))
    assert read.shape == (64, 64, 3) and read.dtype == np.uint8
    assert np.abs(read[20:44, 20:44].astype(int) - (200, 100, 50)).max() <= 2


@pytest.mark.parametrize('mode', ['L', 'RGBA', 'P', '1', 'LA'])
def test_read_image_of_any_mode(tmp_path, mode):
    path = tmp_path / 'x.png'
    Image.fromarray(random_images(1, 40, 40)[0]).convert(mode).save(path)
    assert read_image(path, (32, 64)).shape == (32, 64, 3)


def test_read_image_turns_photos(tmp_path):
    path = tmp_path / 'x.png'
    image = np.zeros((40, 20, 3), np.uint8)
    image[:20] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(image).save(path, exif=exif)
    read = read_image(path, (40, 20))
    assert read[:18].max() == 0 and read[22:].min() == 255


def test_read_image_refuses(tmp_path):
    path = tmp_path / 'x.png'
    path.write_text('hello')
    with pytest.raises(ValueError, match=f'image {path} cannot be read'):
        read_image(path, (32, 32))
    Image.fromarray(random_images(1, 200, 200)[0]).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f'image {path} cannot be read'):
        read_image(path, (32, 32))


def test_save_reconstructions(tmp_path):
    path = tmp_path / 'x.png'
    panels = [random_images(2, 32, 96, seed) for seed in range(3)]
    save_reconstructions(path, panels, ('one', 'two', 'three'))
    picture = np.array(Image.open(path))
    # Each panel lies in its column and row, pixel by pixel; above them are the titles.
    top = picture.shape[0] - (2 * 32 + 4)
    assert picture.shape == (top + 68, 3 * 96 + 2 * 4, 3)
    for column, panel in enumerate(panels):
        left = column * 100
        for row, image in enumerate(panel):
            y = top + row * 36
            assert np.array_equal(picture[y : y + 32, left : left + 96], image)
        heading = picture[:top, left : left + 96]
        assert heading.min() < 100 and heading.max() == 255
    with pytest.raises(FileExistsError, match='--force'):
        save_reconstructions(path, panels)
    save_reconstructions(path, panels, force=True)
    with pytest.raises(ValueError, match=r'must end in \.png'):
        save_reconstructions(tmp_path / 'x.jpg', panels)
    with pytest.raises(ValueError, match='2 titles'):
        save_reconstructions(tmp_path / 'y.png', panels, ('one', 'two'))
    with pytest.raises(FileNotFoundError, match='folder'):
        save_reconstructions(tmp_path / 'none' / 'y.png', panels)
    assert [p.name for p in tmp_path.iterdir()] == ['x.png']


def test_titles_tell_what_was_given():
    assert panel_titles(0.75, False) == ('original', 'masked 75%', 'painted back')
    assert 'mean and std of hidden units from the original' in panel_titles(0.6, True)[2]


def test_images_in_subfolders_are_found(tmp_path):
    """As training finds them."""
    (tmp_path / 'a' / 'b').mkdir(parents=True)
    paths = [tmp_path / 'a' / 'b' / 'x.jpg', tmp_path / 'a' / 'y.png']
    for path in (*paths, tmp_path / 'a' / 'notes.txt'):
        path.touch()
    assert find_images([tmp_path]) == paths
