"""What a host feeds a pre-training step: images a second, and where the time of an image goes."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from mmengine.registry import TRANSFORMS, init_default_scope
from torch.utils.data import DataLoader

from ..datasets import RepeatableSampler, UnlabelledImages, find_images
from .report import cell, markdown

SIZES = ((500, 375), (2048, 1536))
"""Width and height of the images that are made: ImageNet's usual one, and 3 megapixels."""

_FEWEST = 64
_CLOSING = (dict(type='mmpretrain.RandomFlip', prob=0.5), dict(type='mmpretrain.PackInputs'))


@dataclass
class DataResult:
    """A pipeline over images of one kind.

    Attributes:
        name: What reads and crops.
        group: The images.
        workers: Numbers of worker processes, as the next one has them.
        seconds: By number of workers, seconds an image, an entry a round.
        parts: By transform, seconds an image in one process, an entry for each image.
        failure: Why it was not measured to the end.
    """

    name: str
    group: str
    workers: Sequence[int] = ()
    seconds: dict[int, list[float]] = field(default_factory=dict)
    parts: dict[str, list[float]] = field(default_factory=dict)
    failure: str = ''


def pipelines(pixels: int) -> dict[str, tuple[list[dict], int]]:
    """What is compared: by name the transforms, and how many crops of an image follow each other.

    Args:
        pixels: Side of the crops.
    """
    crop = dict(crop_ratio_range=(0.2, 1.0), interpolation='bicubic')
    theirs = dict(type='mmpretrain.RandomResizedCrop', scale=pixels, backend='pillow', **crop)
    ours = dict(type='greenmim_mm.LoadRandomResizedCrop', scale=pixels, **crop)
    return {
        'mmcv.LoadImageFromFile, RandomResizedCrop': (
            [dict(type='mmcv.LoadImageFromFile'), theirs],
            1,
        ),
        'greenmim_mm.LoadImageFromFile, RandomResizedCrop': (
            [dict(type='greenmim_mm.LoadImageFromFile'), theirs],
            1,
        ),
        'LoadRandomResizedCrop': ([ours], 1),
        'LoadRandomResizedCrop, repeats=2': ([ours], 2),
    }


def write_photographs(
    folder: Path, photographs: Mapping[str, np.ndarray], size: tuple[int, int]
) -> None:
    """JPEG files of one size, in quality 90, as cameras and ImageNet have them.

    Args:
        folder: Is made.
        photographs: By name RGB, uint8 ``(H, W, 3)``; enlarged and cut as needed.
        size: Width and height.
    """
    folder.mkdir(parents=True)
    width, height = size
    for name, pixels in photographs.items():
        factor = max(width / pixels.shape[1], height / pixels.shape[0])
        enlarged = cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
        cut = np.ascontiguousarray(enlarged[:height, :width, ::-1])
        cv2.imwrite(str(folder / f'{Path(name).stem}.jpg'), cut, [cv2.IMWRITE_JPEG_QUALITY, 90])


def run(
    results: list[DataResult],
    log: Callable[[str], None],
    folders: Mapping[str, Path],
    pixels: int = 224,
    workers: Sequence[int] = (1, 2),
    batch: int = 32,
    repeats: int = 5,
) -> None:
    """Time the pipelines, in turn.

    Args:
        results: Gets an entry for each pipeline and each kind of images.
        log: Takes a line about the progress.
        folders: By name, folders of images.
        pixels: Side of the crops.
        workers: Numbers of worker processes, each of one thread.
        batch: Images of a batch.
        repeats: Rounds.

    Raises:
        ValueError: If a folder has no image.
    """
    init_default_scope('mmpretrain')
    import mmpretrain.datasets  # noqa: F401 - registers its transforms

    cv2.setNumThreads(0)
    for group, folder in folders.items():
        if not (images := list(find_images([str(folder)]))):
            raise ValueError(f'{folder} has no image; name a folder that has')
        for name, (transforms, copies) in pipelines(pixels).items():
            results.append(result := DataResult(name, group, workers))
            result.parts = _time_parts(images, [*transforms, *_CLOSING], copies)
        measured = results[-len(pipelines(pixels)) :]
        # Enough for several batches: indices beyond the last image begin again at the first.
        length = len(images) * -(-max(_FEWEST, 6 * batch) // len(images))
        for number in workers:
            for done in range(repeats):
                for result in measured:
                    transforms, copies = pipelines(pixels)[result.name]
                    dataset = UnlabelledImages(str(folder), pipeline=[*transforms, *_CLOSING])
                    sampler = RepeatableSampler(range(length), seed=done, repeats=copies)
                    loader = DataLoader(
                        dataset, batch, sampler=sampler, num_workers=number, collate_fn=len
                    )
                    seconds = _time_round(loader)
                    result.seconds.setdefault(number, []).append(seconds)
                log(f'{group}, workers={number}: round {done + 1} of {repeats}')


def _time_round(loader: DataLoader) -> float:
    """Seconds an image, without the start of the processes."""
    batches = iter(loader)
    # Each worker is at its second batch then.
    for _ in range(loader.num_workers):
        next(batches)
    start, images = time.perf_counter(), 0
    for size in batches:
        images += size
    return (time.perf_counter() - start) / images


def _time_parts(
    images: Sequence[str], transforms: Sequence[dict], copies: int, least: int = 48
) -> dict[str, list[float]]:
    """Seconds of each transform on each image, after some that do not count."""
    built = [TRANSFORMS.build(transform) for transform in transforms]
    parts: dict[str, list[float]] = {type(transform).__name__: [] for transform in built}
    for number in range(max(least, len(images)) + 8):
        data, spent = [dict(img_path=images[number % len(images)]) for _ in range(copies)], {}
        for results in data:
            for transform in built:
                start = time.perf_counter()
                results = transform(results)
                name = type(transform).__name__
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - start
        if number >= 8:
            for name, seconds in spent.items():
                parts[name].append(seconds / copies)
    return parts


def tables(results: Sequence[DataResult]) -> str:
    """A table for each kind of images; the first pipeline is what the others are held to."""
    sections = []
    for group in dict.fromkeys(result.group for result in results):
        members = [result for result in results if result.group == group]
        rows = []
        for result in members:
            row = {'reading and cropping': result.name}
            for number in result.workers:
                mine, first = (_median(one.seconds.get(number)) for one in (result, members[0]))
                plural = 's' if number != 1 else ''
                row[f'images/s, {number} worker{plural}'] = cell(mine and 1 / mine, '{:.0f}')
                row[f'ratio, {number}'] = cell(mine and first and first / mine, '{:.2f}x')
            parts = {name: 1e3 * statistics.median(v) for name, v in result.parts.items() if v}
            row['ms an image, one process'] = ', '.join(
                f'{name} {value:.2f}' for name, value in parts.items()
            )
            rows.append(row | ({'failure': result.failure} if result.failure else {}))
        sections.append(f'### {group}\n\n{markdown(rows)}')
    return '\n\n'.join(sections)


def _median(seconds: Sequence[float] | None) -> float | None:
    return statistics.median(seconds) if seconds else None
