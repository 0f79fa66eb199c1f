"""Images of every kind that people have, and files that only look like images."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from mmengine.registry import TRANSFORMS
from PIL import Image

from greenmim_mm.datasets import UnreadableImageError, read_image

RNG = np.random.default_rng(0)
# Smooth, so that JPEG and chroma subsampling change little.
RAMP = np.stack(
    np.broadcast_arrays(
        np.linspace(0, 250, 48)[None, :], np.linspace(250, 0, 32)[:, None], np.full((1, 1), 90.0)
    ),
    axis=-1,
).astype(np.uint8)
BGR = RAMP[..., ::-1]


def encoded(image: Image.Image, kind: str, **options) -> BytesIO:
    file = BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def png(width: int, height: int, data: bytes) -> bytes:
    """A PNG of 8-bit grey with any header and any data."""

    def chunk(kind, body):
        return (
            struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
        )

    header = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
    return (
        b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', data) + chunk(b'IEND', b'')
    )


@pytest.mark.parametrize(
    ('kind', 'options', 'tolerance'),
    [
        ('PNG', {}, 0),
        ('BMP', {}, 0),
        ('TIFF', {}, 0),
        ('TIFF', dict(compression='tiff_lzw'), 0),
        ('WEBP', dict(lossless=True), 0),
        ('WEBP', dict(quality=95), 12),
        ('JPEG', dict(quality=95, subsampling=0), 6),
        ('JPEG', dict(quality=95, subsampling=0, progressive=True), 6),
    ],
)
def test_formats(kind, options, tolerance):
    result = read_image(encoded(Image.fromarray(RAMP), kind, **options))
    assert result.dtype == np.uint8 and result.flags.c_contiguous
    assert np.abs(result.astype(int) - BGR).max() <= tolerance


@pytest.mark.parametrize('kind', ['PNG', 'TIFF'])
def test_grey_and_16_bit_grey(kind):
    grey = RAMP[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=-1)
    assert np.array_equal(read_image(encoded(Image.fromarray(grey), kind)), expected)
    wide = (grey.astype(np.uint16) << 8) | 0x7F
    assert np.array_equal(read_image(encoded(Image.fromarray(wide), kind)), expected)


def test_16_bit_colour():
    import cv2

    wide = (BGR.astype(np.uint16) << 8) | 0x7F
    for ending in ('.png', '.tiff'):
        done, file = cv2.imencode(ending, wide)
        assert done
        assert np.array_equal(read_image(BytesIO(file.tobytes())), BGR), ending


def test_float_tiff():
    values = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    result = read_image(encoded(Image.fromarray(values), 'TIFF'))
    assert np.array_equal(result[..., 0], np.round(values * 255).astype(np.uint8))
    for bad in (values * 1000, np.full_like(values, np.nan)):
        with pytest.raises(ValueError, match='not between 0 and 1'):
            read_image(encoded(Image.fromarray(bad), 'TIFF'))


def test_palette_bilevel_and_cmyk():
    # Web-safe colours stay exact in a palette.
    safe = (RAMP // 51 * 51).astype(np.uint8)
    palette = Image.fromarray(safe).convert('P', palette=Image.Palette.WEB)
    for kind in ('PNG', 'GIF', 'BMP'):
        assert np.array_equal(read_image(encoded(palette, kind)), safe[..., ::-1])
    bits = Image.fromarray(((RAMP[..., 0] > 100) * 255).astype(np.uint8)).convert('1', dither=0)
    assert set(np.unique(read_image(encoded(bits, 'PNG')))) == {0, 255}
    cmyk = read_image(encoded(Image.fromarray(RAMP).convert('CMYK'), 'JPEG', quality=95))
    assert np.abs(cmyk.astype(int) - BGR).max() <= 24


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P'])
def test_transparent_pixels_are_white(mode):
    rgba = np.dstack([RAMP // 51 * 51, np.full(RAMP.shape[:2], 255, np.uint8)])
    rgba[:8, :8, 3] = 0
    image = Image.fromarray(rgba).convert(mode)
    result = read_image(encoded(image, 'PNG'))
    assert (result[:8, :8] == 255).all()
    assert (result[8:] != 255).any()
    if mode == 'RGBA':
        assert np.array_equal(result[8:], rgba[8:, :, 2::-1])


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'TIFF', 'WEBP'])
def test_rotation_by_exif(kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the first row is the right side
    options = dict(quality=95) if kind in ('JPEG', 'WEBP') else {}
    result = read_image(encoded(Image.fromarray(RAMP), kind, exif=exif, **options))
    assert np.abs(result.astype(int) - np.rot90(BGR, -1)).mean() < 4


@pytest.mark.parametrize('size', [(1, 1), (1, 500), (500, 1), (2, 3)])
def test_tiny_images(size):
    image = Image.new('RGB', size, 'red')
    assert (read_image(encoded(image, 'PNG')) == (0, 0, 255)).all()


def test_large_jpegs_are_decoded_smaller():
    image = Image.fromarray(RNG.integers(0, 256, (30, 40, 3), np.uint8)).resize((1203, 901))
    whole = read_image(encoded(image, 'JPEG'))
    assert whole.shape == (901, 1203, 3)
    half = read_image(encoded(image, 'JPEG'), max_pixels=300_000)
    assert half.shape == (451, 602, 3)
    assert np.abs(half.mean((0, 1)) - whole.mean((0, 1))).max() < 2
    assert read_image(encoded(image, 'JPEG'), max_pixels=18_000).shape == (113, 151, 3)
    for source, limit in ((encoded(image, 'JPEG'), 17_000), (encoded(image, 'PNG'), 300_000)):
        with pytest.raises(ValueError, match='1203 x 901 pixels are more than'):
            read_image(source, max_pixels=limit)
    with pytest.raises(ValueError, match='1203 x 901 pixels'):
        read_image(encoded(image, 'JPEG', progressive=True), max_pixels=300_000)


def test_decompression_bombs_take_no_memory():
    import tracemalloc

    # 2.5 gigapixels out of a few kilobytes of zeros.
    bomb = png(50_000, 50_000, zlib.compress(bytes(10_000_000)))
    tracemalloc.start()
    with pytest.raises(ValueError, match='50000 x 50000 pixels'):
        read_image(BytesIO(bomb))
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    # A pixel that inflates to far more than it says: decoding ends where the image does.
    assert read_image(BytesIO(png(1, 1, zlib.compress(bytes(100_000_000))))).shape == (1, 1, 3)


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'TIFF', 'BMP', 'GIF'])
def test_cut_off_files_are_refused(kind, tmp_path):
    noise = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8))
    content = encoded(noise, kind).getvalue()
    loader = TRANSFORMS.build(dict(type='greenmim_mm.LoadImageFromFile'))
    for share in (0, 0.02, 0.5, 0.9):
        path = tmp_path / f'{share}.jpg'
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(UnreadableImageError, match=f'image {path} cannot be read') as error:
            loader(dict(img_path=str(path)))
        assert '\n' not in str(error.value)


def test_names_do_not_matter_contents_do(tmp_path):
    loader = TRANSFORMS.build(dict(type='greenmim_mm.LoadImageFromFile'))
    path = tmp_path / 'photo.jpg'
    path.write_bytes(encoded(Image.fromarray(RAMP), 'PNG').getvalue())
    results = loader(dict(img_path=str(path)))
    assert np.array_equal(results['img'], BGR)
    assert results['img_shape'] == results['ori_shape'] == (32, 48)
    # What would start Ghostscript is not even looked at.
    for content in (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', b'%PDF-1.7', b'<html>'):
        path.write_bytes(content)
        with pytest.raises(UnreadableImageError, match='cannot identify'):
            loader(dict(img_path=str(path)))


def test_pillows_own_limit_stands_afterwards():
    before = Image.MAX_IMAGE_PIXELS
    read_image(encoded(Image.fromarray(RAMP), 'PNG'))
    with pytest.raises(OSError):
        read_image(BytesIO(b''))
    assert before == Image.MAX_IMAGE_PIXELS is not None
