"""Features of image files from a checkpoint of any format."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dataset import Compose, default_collate
from mmengine.registry import DefaultScope
from torch.utils.data import DataLoader, Dataset

from ..checkpoint import inspect_checkpoint
from ..datasets import UnreadableImageError
from .frozen import backbone_config, feature_config, own_checkpoint


@dataclass(frozen=True)
class Features:
    """Features of images.

    Attributes:
        paths: The images that could be read.
        values: ``(N, C)`` float32, the last map averaged.
        bad: Images that could not, with the reason.
    """

    paths: list[str]
    values: np.ndarray
    bad: dict[str, str]


class _Images(Dataset):
    """Images through a pipeline; for a bad one its number and the reason."""

    def __init__(self, paths: Sequence[str], pipeline: Compose) -> None:
        self.paths = paths
        self.pipeline = pipeline

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        try:
            return index, self.pipeline(dict(img_path=self.paths[index]))
        except UnreadableImageError as error:
            return index, str(error.__cause__ or error)


def _collate(items: list[tuple[int, Any]]) -> tuple[list[int], Any, dict[int, str]]:
    good = [(index, data) for index, data in items if not isinstance(data, str)]
    bad = {index: data for index, data in items if isinstance(data, str)}
    batch = default_collate([data for _, data in good]) if good else None
    return [index for index, _ in good], batch, bad


def usual_image_size(checkpoint: str | Path, window_size: Any = None) -> int:
    """Side in pixels at which the last map is one window: 224 for windows of 7 tokens."""
    windows = inspect_checkpoint(checkpoint).architecture.window_sizes
    if window_size is not None:
        windows = (window_size,) if isinstance(window_size, int) else tuple(window_size)
    return 32 * windows[-1] if windows else 224


@torch.no_grad()
def image_features(
    checkpoint: str | Path,
    paths: Sequence[str],
    image_size: int | None = None,
    resize: int | None = None,
    window_size: Any = None,
    batch_size: int = 64,
    workers: int = 2,
    device: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Features:
    """Features of images, of any kind that pre-training takes.

    Args:
        checkpoint: File of any known format.
        paths: Image files.
        image_size: Side of the square cut from the middle, in pixels; None: see
            :func:`usual_image_size`.
        resize: Pixels of the shorter side before; None: 8/7 of ``image_size``.
        window_size: Windows instead of the checkpoint's.
        batch_size: Images of a step.
        workers: Processes that load images.
        device: Where it runs; None: a GPU if there is one.
        progress: Takes the number of images that are done.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        CheckpointError: If it is damaged or no Swin.
        ValueError: If its windows are told by neither the file nor ``window_size``.
    """
    from mmpretrain.apis import get_model
    from mmpretrain.registry import TRANSFORMS

    if device is None:
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    size = image_size or usual_image_size(checkpoint, window_size)
    with own_checkpoint(checkpoint) as path:
        cfg = feature_config(path, backbone_config(path, window_size), size, resize)
        model = get_model(cfg, device=device)
        # Strictly: mmengine's loader only warns of what does not fit.
        model.backbone.init_weights()
    model.eval()
    pipeline = cfg.test_dataloader.dataset.pipeline
    pipeline[0] = dict(type='greenmim_mm.LoadImageFromFile')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        images = _Images(paths, Compose([TRANSFORMS.build(step) for step in pipeline]))
    loader = DataLoader(images, batch_size, num_workers=workers, collate_fn=_collate)
    found: list[np.ndarray] = []
    kept: list[str] = []
    bad: dict[str, str] = {}
    for indices, batch, failed in loader:
        bad.update({paths[index]: reason for index, reason in failed.items()})
        if batch is not None:
            values = model(**model.data_preprocessor(batch, False), mode='tensor')[-1]
            found.append(values.float().cpu().numpy())
            kept += [paths[index] for index in indices]
        if progress:
            progress(len(kept) + len(bad))
    width = model.backbone.num_features[-1]
    return Features(kept, np.concatenate(found) if found else np.zeros((0, width)), bad)
