"""What a pre-training shows while it runs: a status line, metrics, pictures."""

import json
import os
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from PIL import Image, ImageOps

from ...datasets import read_image
from ...engine.loops import batch_size
from ...ops import mask_generator, random_mask, unit_grid
from ...visualization import panel_titles, reconstruction_panels, save_reconstructions
from ..screen import Screen, clock

_ESTIMATE_AFTER = 20
_RECENT = 50
# Lines of metrics.jsonl, at most.
_LINES = 2000
_PICTURES = 10
_IMAGES = 8


class ProgressHook(Hook):
    """A status line on the screen, and a line in ``metrics.jsonl`` every few steps.

    Args:
        screen: Where to.
        metrics: File to append to; after a resume its later lines are cut off.
    """

    # After all that belongs to the step, before the hook that ends a run on a signal.
    priority = 'VERY_LOW'

    def __init__(self, screen: Screen, metrics: Path) -> None:
        self.screen = screen
        self.metrics = metrics

    def before_train(self, runner: Runner) -> None:
        """Start the clocks."""
        if not is_main_process():
            return
        self._interval = max(runner.max_iters // _LINES, 1)
        self._first = runner.iter
        self._losses: list[float] = []
        self._recent: deque[tuple[float, float]] = deque(maxlen=_RECENT)
        cut_metrics(self.metrics, runner.iter)
        self._end = time.monotonic()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """The images are there."""
        if is_main_process():
            self._loaded = time.monotonic()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Show how it goes."""
        if not is_main_process():
            return
        step, total = runner.iter + 1, runner.max_iters
        loss = float(outputs['loss'].detach())
        self._losses.append(loss)
        now = time.monotonic()
        self._recent.append((now - self._end, self._loaded - self._end))
        self._end = now
        seconds, waited = (sum(times) for times in zip(*self._recent, strict=True))
        images = batch_size(data_batch) * get_world_size()
        speed = images * len(self._recent) / max(seconds, 1e-9)
        share = waited / max(seconds, 1e-9)
        left = (total - step) * seconds / len(self._recent)
        if step - self._first == _ESTIMATE_AFTER and left > 0:
            self.screen.say(
                f'about {clock(left)} to go, as the first {_ESTIMATE_AFTER} steps tell '
                f'({speed:.0f} images/s)'
            )
        self.screen.status(
            f'step {step}/{total}  loss {loss:.4f}  {speed:.0f} images/s  '
            f'{share:.0%} waiting for data  {clock(left)} left',
            now=step == total,
        )
        if step % self._interval == 0 or step == total:
            self._write(runner, step, speed, share)

    def after_train(self, runner: Runner) -> None:
        """Leave the last status on the screen."""
        self.screen.end_status()

    def _write(self, runner: Runner, step: int, speed: float, share: float) -> None:
        rate = next(iter(runner.optim_wrapper.get_lr().values()))[0]
        entry = dict(
            step=step,
            epoch=runner.epoch + 1,
            loss=round(float(np.mean(self._losses)), 6),
            lr=rate,
            images_per_second=round(speed, 2),
            share_waiting_for_data=round(share, 4),
        )
        scalars = runner.message_hub.log_scalars
        if 'train/grad_norm' in scalars:
            entry['grad_norm'] = float(scalars['train/grad_norm'].current())
        self._losses = []
        with self.metrics.open('a', encoding='utf-8') as file:
            file.write(json.dumps(entry) + '\n')


class PicturesHook(Hook):
    """Paint a fixed set of images under fixed masks as training goes, and the loss's curve.

    Args:
        images: ``(B, H, W, 3)`` uint8, RGB.
        folder: Where to.
        metrics: See :class:`ProgressHook`.
        seed: Of the masks.
    """

    # Before the checkpoint of the epoch, so that what it names is there.
    priority = 'NORMAL'

    def __init__(self, images: np.ndarray, folder: Path, metrics: Path, seed: int = 0) -> None:
        self.images = images
        self.folder = folder
        self.metrics = metrics
        self.seed = seed

    def after_train_epoch(self, runner: Runner) -> None:
        """Paint every few epochs."""
        epoch = runner.epoch + 1
        interval = max(runner.max_epochs // _PICTURES, 1)
        if is_main_process() and (epoch % interval == 0 or epoch == runner.max_epochs):
            try:
                self.paint(runner.model, f'epoch_{epoch:04d}.png')
            except OSError as error:
                # No picture is worth a run.
                runner.logger.warning(f'no pictures of epoch {epoch}: {error}')

    def paint(self, model: Any, name: str) -> None:
        """Write the pictures of now.

        Raises:
            OSError: If that cannot be done.
        """
        self.folder.mkdir(exist_ok=True)
        if len(self.images):
            model = model.module if is_model_wrapper(model) else model
            parts = [_paint(model, image, self.seed, i) for i, image in enumerate(self.images)]
            panels = [np.concatenate(column) for column in zip(*parts, strict=True)]
            titles = panel_titles(model.mask_ratio, model.head.norm_pix)
            save_reconstructions(self.folder / name, panels, titles, force=True)
        draw_loss(self.metrics, self.folder / 'loss.png')


def _paint(model: Any, image: np.ndarray, seed: int, number: int) -> tuple[np.ndarray, ...]:
    rows, columns = unit_grid(*image.shape[:2])
    mask = random_mask(rows * columns, model.mask_ratio, mask_generator(seed, 0, number))
    return reconstruction_panels(model, image[None], mask)


def sample_images(paths: Sequence[str], size: int, count: int = _IMAGES) -> np.ndarray:
    """Some images, spread over all of them, each covering a square; unreadable ones left out.

    Args:
        paths: Image files.
        size: Side in pixels.
        count: How many, at most.

    Returns:
        ``(B, size, size, 3)`` uint8, RGB.
    """
    images: list[np.ndarray] = []
    step = max(len(paths) // count, 1)
    for path in paths[::step][:count]:
        try:
            pixels = read_image(path)
        # Each decoder has its own errors; training will name the file.
        except Exception:
            continue
        image = Image.fromarray(np.ascontiguousarray(pixels[..., ::-1]))
        images.append(np.array(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)))
    return np.stack(images) if images else np.zeros((0, size, size, 3), np.uint8)


def cut_metrics(path: Path, steps: int) -> None:
    """Remove the lines behind a step: a run that is resumed from it does them again."""
    if not path.exists():
        return
    kept = [entry for entry in read_metrics(path) if entry['step'] <= steps]
    part = path.with_name(f'.{path.name}.part')
    part.write_text(''.join(json.dumps(entry) + '\n' for entry in kept), encoding='utf-8')
    os.replace(part, path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; a last one that was cut off does not count."""
    entries = []
    for line in path.read_text(encoding='utf-8').splitlines() if path.exists() else ():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def draw_loss(metrics: Path, path: Path) -> None:
    """Draw the loss over the steps as a PNG."""
    from matplotlib.figure import Figure

    from ...fileio import atomic_path

    entries = read_metrics(metrics)
    if not entries:
        return
    figure = Figure(figsize=(7, 4), layout='constrained')
    axes = figure.add_subplot()
    axes.plot([e['step'] for e in entries], [e['loss'] for e in entries], linewidth=1)
    axes.set(xlabel='step', ylabel='reconstruction loss')
    axes.xaxis.get_major_locator().set_params(integer=True)  # there are no half steps
    axes.grid(alpha=0.3)
    with atomic_path(path, force=True) as temporary:
        figure.savefig(temporary, dpi=120, format='png')
