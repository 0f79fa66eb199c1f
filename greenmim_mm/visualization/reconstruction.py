"""Images, what a masked model sees of them, and what it paints where it sees nothing."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn

from ..checkpoint import load_model_state_dict
from ..fileio import atomic_path, check_destination
from ..ops import (
    UNIT_SIZE,
    as_unit_mask,
    mask_generator,
    random_mask,
    take_units,
    unit_grid,
)
from ..registry import MODELS

IMAGE_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')

Panels = tuple[np.ndarray, np.ndarray, np.ndarray]

_HIDDEN_GREY = 128
_GAP = 4
_FONT_SIZE = 12
_LINE_HEIGHT = 16


def load_model(config: str | Path, checkpoint: str | Path, device: str = 'cpu') -> nn.Module:
    """Build a pre-training model from a config and load all of its weights.

    Args:
        config: Config file of a recipe; its ``model`` is built.
        checkpoint: Checkpoint of a run of that config.
        device: Device of torch, e.g. 'cpu' or 'cuda'.

    Returns:
        The model on ``device``, in eval mode.

    Raises:
        FileNotFoundError: If a file does not exist.
        CheckpointError: If the weights are not this model's; it says how many keys match.
        ValueError: If the config describes no model that paints, or there is no such device.
    """
    if torch.device(device).type == 'cuda' and not torch.cuda.is_available():
        raise ValueError(f'device={device!r}: torch finds no CUDA device here; use cpu')
    if not Path(config).is_file():
        raise FileNotFoundError(f'config {config} does not exist')
    # A config is a program and a model takes anything: both can fail in any way.
    try:
        cfg = Config.fromfile(config)
        with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmpretrain')):
            model = MODELS.build(cfg.model)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), '')
        raise ValueError(
            f'config {config} gives no model: {type(error).__name__}: {reason}'
        ) from error
    if not hasattr(model, 'reconstruct'):
        raise ValueError(
            f'config {config} describes a {type(model).__name__}, which does not paint images; '
            'give the config of a GreenMIM pre-training'
        )
    load_model_state_dict(model, checkpoint)
    return model.to(device).eval()


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Image files, and those inside of folders and of their sub-folders, by name.

    Raises:
        FileNotFoundError: If a path does not exist or a folder has no images.
    """
    images: list[Path] = []
    for path in map(Path, paths):
        found = [path]
        if path.is_dir():
            found = sorted(p for p in path.rglob('*') if p.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise FileNotFoundError(
                    f'folder {path} has no images ({", ".join(IMAGE_SUFFIXES)})'
                )
        elif not path.exists():
            raise FileNotFoundError(f'image {path} does not exist')
        images += found
    return images


def read_image(path: str | Path, size: tuple[int, int]) -> np.ndarray:
    """Read an image, resized to cover ``size`` and cropped to it around its centre.

    Args:
        path: Image file.
        size: ``(height, width)`` in pixels.

    Returns:
        ``(height, width, 3)`` uint8, RGB.

    Raises:
        ValueError: If the file cannot be read as an image.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert('RGB')
    # PIL's decoders raise whatever a broken file leads them to.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), '')
        raise ValueError(f'image {path} cannot be read: {reason}') from error
    return np.array(ImageOps.fit(image, size[::-1], Image.Resampling.BICUBIC))


@torch.no_grad()
def reconstruction_panels(
    model: nn.Module, images: np.ndarray, mask: Tensor | np.ndarray
) -> Panels:
    """Original, masked and painted-back images.

    The painted image has the original's pixels where the mask shows them and the model's where
    it hides them. A model that was trained with ``norm_pix`` predicts hidden units up to their
    mean and standard deviation: these two numbers, one pair a unit, are then **taken from the
    hidden unit of the original**, so brightness and contrast are no merit of the model.

    Args:
        model: :class:`~greenmim_mm.models.GreenMIM`. Its data preprocessor normalises the images
            and decides on the order of channels: OpenMMLab loads BGR, so the model sees RGB if
            the preprocessor swaps (``to_rgb``, ``bgr_to_rgb``), else BGR.
        images: ``(B, H, W, 3)`` uint8, RGB, sides divisible by 32.
        mask: Bool, True = masked, as :meth:`~greenmim_mm.models.GreenMIM.reconstruct` takes it.

    Returns:
        Three ``(B, H, W, 3)`` uint8 arrays, RGB. Hidden units are grey in the second.

    Raises:
        TypeError: If ``images`` is not uint8 or ``mask`` is not boolean.
        ValueError: If a shape does not fit, or the mask hides everything.
    """
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        found = getattr(images, 'dtype', type(images).__name__)
        raise TypeError(f'images must be a uint8 array, not {found}')
    if images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f'images has shape {images.shape}; give (B, H, W, 3)')
    mask = as_unit_mask(mask, unit_grid(*images.shape[1:3]), len(images))

    preprocessor = model.data_preprocessor
    bgr = torch.from_numpy(images[..., ::-1].copy()).permute(0, 3, 1, 2)
    inputs = preprocessor({'inputs': bgr, 'data_samples': None})['inputs']

    was_training = model.training
    model.eval()
    try:
        prediction = model.reconstruct(inputs, mask).float()
    finally:
        model.train(was_training)
    if model.head.norm_pix:
        # The inverse of MAEPretrainHead.construct_target.
        target = to_units(inputs)
        variance = target.var(dim=-1, keepdim=True)
        prediction = prediction * (variance + 1e-6).sqrt() + target.mean(dim=-1, keepdim=True)
    pixels = from_units(prediction, mask.grid)
    # Without normalisation the preprocessor has neither of the two.
    pixels = pixels * getattr(preprocessor, 'std', 1) + getattr(preprocessor, 'mean', 0)
    pixels = pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    if not getattr(preprocessor, '_channel_conversion', False):
        pixels = pixels[..., ::-1]

    hidden = np.kron(mask.hidden.reshape(mask.grid), np.ones((UNIT_SIZE, UNIT_SIZE), dtype=bool))[
        ..., None
    ]
    masked = np.where(hidden, np.uint8(_HIDDEN_GREY), images)
    return images.copy(), masked, np.where(hidden, pixels, images)


def reconstruct_files(
    model: nn.Module,
    paths: Sequence[str | Path],
    size: int | tuple[int, int] | None = None,
    mask_ratio: float = 0.75,
    seed: int = 0,
) -> Panels:
    """Panels of image files, each under a mask of its own.

    Args:
        model: :class:`~greenmim_mm.models.GreenMIM`.
        paths: Image files.
        size: Side in pixels or ``(height, width)``, divisible by 32; the ``img_size`` of the
            model's backbone if None.
        mask_ratio: Share of mask units to hide, in (0, 1).
        seed: Seed of the masks, not negative.

    Returns:
        Three ``(len(paths), H, W, 3)`` arrays as of :func:`reconstruction_panels`.

    Raises:
        ValueError: If there is no image, one cannot be read, or an argument makes no sense.
    """
    if not paths:
        raise ValueError('paths is empty; give at least one image')
    if seed < 0:
        raise ValueError(f'seed={seed} must not be negative')
    if size is None:
        size = model.backbone.img_size
    height, width = (size, size) if isinstance(size, int) else size
    rows, columns = unit_grid(height, width)
    panels = []
    for number, path in enumerate(paths):
        image = read_image(path, (height, width))
        mask = random_mask(rows * columns, mask_ratio, mask_generator(seed, 0, number))
        panels.append(reconstruction_panels(model, image[None], mask))
    return tuple(np.concatenate(column) for column in zip(*panels, strict=True))


def panel_titles(mask_ratio: float, norm_pix: bool) -> tuple[str, str, str]:
    """Titles of the three columns; with ``norm_pix`` the last says what it takes from the truth."""
    given = ' (mean and std of hidden units from the original)' if norm_pix else ''
    return 'original', f'masked {mask_ratio:.0%}', f'painted back{given}'


def save_reconstructions(
    path: str | Path,
    panels: Sequence[np.ndarray],
    titles: Sequence[str] = ('original', 'masked', 'painted back'),
    force: bool = False,
) -> None:
    """Write panels as one PNG: a column for each array with its title, a row for each image.

    Args:
        path: File to write, ``*.png``; its folder must exist.
        panels: ``(B, H, W, 3)`` uint8 arrays of one shape, RGB.
        titles: One for each array.
        force: Replace an existing file.

    Raises:
        FileExistsError: If ``path`` exists and ``force`` is not given.
        FileNotFoundError: If its folder does not exist.
        ValueError: If the name does not end in ``.png``, or panels and titles do not fit.
    """
    check_picture_path(path, force)
    shapes = {panel.shape for panel in panels}
    if len(shapes) != 1 or len(panels) != len(titles):
        raise ValueError(
            f'{len(titles)} titles for panels of shapes {[panel.shape for panel in panels]}; give '
            'arrays of one shape and a title for each'
        )
    count, height, width, _ = shapes.pop()
    font = _font()
    headings = [_wrap(title, font, width - 2) for title in titles]
    top = _LINE_HEIGHT * max(map(len, headings)) + _GAP
    size = (len(panels) * (width + _GAP) - _GAP, top + count * (height + _GAP) - _GAP)
    picture = Image.new('RGB', size, 'white')
    draw = ImageDraw.Draw(picture)
    for column, (panel, heading) in enumerate(zip(panels, headings, strict=True)):
        left = column * (width + _GAP)
        for number, line in enumerate(heading):
            draw.text((left + 2, number * _LINE_HEIGHT), line, fill='black', font=font)
        for row, image in enumerate(panel):
            picture.paste(Image.fromarray(image), (left, top + row * (height + _GAP)))
    with atomic_path(path, force) as temporary:
        picture.save(temporary, format='PNG')


def check_picture_path(path: str | Path, force: bool = False) -> None:
    """Raise, as :func:`save_reconstructions` would, unless a PNG can be written to ``path``."""
    if Path(path).suffix.lower() != '.png':
        raise ValueError(f'{path} must end in .png')
    check_destination(path, force)


def to_units(images: Tensor) -> Tensor:
    """``(B, C, H, W)`` to ``(B, L, 32 * 32 * C)``, pixels in the order row, column, channel."""
    rows, columns = unit_grid(*images.shape[2:])
    return take_units(images, np.arange(rows * columns)).permute(0, 1, 3, 4, 2).flatten(2)


def from_units(units: Tensor, grid: tuple[int, int]) -> Tensor:
    """Inverse of :func:`to_units` for a grid of ``(rows, columns)`` mask units."""
    pixels = units.unflatten(2, (UNIT_SIZE, UNIT_SIZE, -1)).unflatten(1, grid)
    return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    try:
        return ImageFont.load_default(_FONT_SIZE)
    except TypeError:  # Pillow before 10.1 has one size.
        return ImageFont.load_default()


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of whole words that fit into ``width`` pixels, where a word does."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f'{lines[-1]} {word}') <= width:
            lines[-1] += f' {word}'
        else:
            lines.append(word)
    return lines
