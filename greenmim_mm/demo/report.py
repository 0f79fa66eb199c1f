"""What came out of the demo: figures, pictures, and a page that shows them."""

import json
import os
import platform
from collections.abc import Mapping
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .road import Network, Scale, steps
from .running import Outcome

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402 - the backend comes first

RUNS = {'greenmim': 'GreenMIM', 'scratch': 'from scratch'}

MEASURED_GAIN = '0.125 ± 0.017'
"""With 100 labels, of the study's three seeds; a test holds it against docs/evidence."""

_KINDS = {'bbox': 'box', 'segm': 'mask'}
# One colour a digit, far apart in hue, RGB.
_COLOURS = (plt.get_cmap('tab10')(np.arange(10))[:, :3] * 255).astype(int).tolist()


def average_precision(annotations: Path, results: Path, kind: str) -> dict[str, float]:
    """COCO average precision by pycocotools.

    Args:
        annotations: COCO file of the validation images.
        results: COCO results file.
        kind: 'bbox' or 'segm'.

    Returns:
        ``AP``, ``AP50`` and ``AP75``, in [0, 1]; zeros if nothing was detected.
    """
    names = ('AP', 'AP50', 'AP75')
    detections = json.loads(results.read_text(encoding='utf-8'))
    if not detections:
        return dict.fromkeys(names, 0.0)
    with redirect_stdout(StringIO()):  # pycocotools talks
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(detections), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(names, evaluation.stats[:3].tolist(), strict=True))


def read_losses(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses that a training run logged, all its calls together.

    Args:
        folder: Work folder of the run.

    Returns:
        Steps ``(K,)`` and losses ``(K,)``, by step; a step logged twice counts the later time.
    """
    losses: dict[int, float] = {}
    for file in sorted(folder.glob('*/vis_data/scalars.json')):
        for line in file.read_text(encoding='utf-8').splitlines():
            entry = json.loads(line)
            if 'loss' in entry:
                losses[entry['step']] = entry['loss']
    order = sorted(losses)
    return np.array(order), np.array([losses[step] for step in order])


def write_report(scale: Scale, outcomes: Mapping[str, Outcome], root: Path) -> Path:
    """Evaluate, draw, and write ``report.md`` into the demo's folder.

    Args:
        scale: How much the demo did.
        outcomes: What each step took.
        root: Root of the repository.

    Returns:
        The path of the report.
    """
    folder = root / scale.folder
    annotations = folder / 'data/coco/annotations/instances_val.json'
    precision = {
        run: {
            kind: average_precision(annotations, folder / f'test_{run}/val.{kind}.json', kind)
            for kind in _KINDS
        }
        for run in RUNS
    }
    losses = {
        name: read_losses(folder / name)
        for name in ('pretrain', *(f'detect_{run}' for run in RUNS))
    }
    draw_losses(losses, folder / 'losses.png')
    draw_detections(
        annotations,
        folder / 'data/coco/val',
        {title: folder / f'test_{run}/val.segm.json' for run, title in RUNS.items()},
        folder / 'detections.png',
    )
    text = _page(scale, outcomes, precision, losses)
    temporary = folder / 'report.md.tmp'
    temporary.write_text(text, encoding='utf-8')
    temporary.replace(folder / 'report.md')
    (folder / 'results.json').write_text(json.dumps(precision, indent=2), encoding='utf-8')
    return folder / 'report.md'


def draw_losses(losses: Mapping[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """Loss curves: pre-training on the left, both detectors on the right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout='constrained')
    # Very little is logged of a quick run: a single point has no line.
    style = dict(marker='.') if min(len(x) for x, _ in losses.values()) < 3 else {}
    left.plot(*losses['pretrain'], color='tab:green', **style)
    left.set(title='GreenMIM pre-training', xlabel='iteration', ylabel='loss on hidden pixels')
    for run, colour in zip(RUNS, ('tab:green', 'tab:gray'), strict=True):
        right.plot(*losses[f'detect_{run}'], color=colour, label=RUNS[run], **style)
    right.set(title='Mask R-CNN', xlabel='iteration', ylabel='loss')
    right.legend(frameon=False)
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_detections(
    annotations: Path,
    images: Path,
    found: Mapping[str, Path],
    path: Path,
    count: int = 4,
    threshold: float = 0.5,
) -> None:
    """Images with the truth and what each detector finds, a row an image.

    Args:
        annotations: COCO file of the images.
        images: Folder of the images.
        found: By title, the COCO results file of a detector, with masks.
        path: PNG to write.
        count: Images to draw, the first ones.
        threshold: Least score of a detection that is drawn.
    """
    with redirect_stdout(StringIO()):
        truth = COCO(str(annotations))
    names = {entry['id']: entry['name'] for entry in truth.dataset['categories']}
    detections = {
        title: json.loads(file.read_text(encoding='utf-8')) for title, file in found.items()
    }
    chosen = truth.dataset['images'][:count]
    figure, grid = plt.subplots(
        len(chosen),
        1 + len(found),
        figsize=(2.6 * (1 + len(found)), 2.6 * len(chosen)),
        layout='constrained',
        squeeze=False,
    )
    for axes, title in zip(grid[0], ['truth', *found], strict=True):
        axes.set_title(title)
    for row, image in zip(grid, chosen, strict=True):
        pixels = cv2.imread(str(images / image['file_name']))[..., ::-1]
        objects = [truth.imgToAnns[image['id']]]
        objects += [
            [e for e in entries if e['image_id'] == image['id'] and e['score'] >= threshold]
            for entries in detections.values()
        ]
        for axes, entries in zip(row, objects, strict=True):
            _draw_objects(axes, pixels, entries, names, truth)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_objects(
    axes: plt.Axes, pixels: np.ndarray, entries: list[dict], names: dict, truth: COCO
) -> None:
    axes.imshow(_overlay(pixels, entries, names, truth))
    axes.set_axis_off()
    for entry in entries:
        left, top, _, _ = entry['bbox']
        score = f' {entry["score"]:.2f}' if 'score' in entry else ''
        axes.text(
            left,
            max(top - 2, 8),
            names[entry['category_id']] + score,
            color='white',
            fontsize=7,
            bbox=dict(
                facecolor=np.divide(_COLOURS[int(names[entry['category_id']])], 255),
                edgecolor='none',
                pad=1,
            ),
        )


def _overlay(pixels: np.ndarray, entries: list[dict], names: dict, truth: COCO) -> np.ndarray:
    """Masks and boxes over an RGB image ``(H, W, 3)`` uint8."""
    result = pixels.astype(np.float32)
    for entry in entries:
        colour = np.array(_COLOURS[int(names[entry['category_id']])])
        mask = truth.annToMask(entry).astype(bool)
        result[mask] = 0.4 * result[mask] + 0.6 * colour
    result = result.astype(np.uint8)
    for entry in entries:
        left, top, width, height = (round(value) for value in entry['bbox'])
        colour = _COLOURS[int(names[entry['category_id']])]
        cv2.rectangle(result, (left, top), (left + width, top + height), colour, 1)
    return result


def _page(
    scale: Scale,
    outcomes: Mapping[str, Outcome],
    precision: Mapping[str, Mapping[str, Mapping[str, float]]],
    losses: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> str:
    network = scale.network
    lines = [
        '# What the demo showed',
        '',
        f'A small {network.backbone} {_beginning(network)} was pre-trained with GreenMIM for '
        f'{_epochs(scale.pretrain_epochs)} on {scale.num_unlabelled} unlabelled images. Its '
        f'weights went into a Mask R-CNN of mmdet with {network.detector}, trained for '
        f'{_epochs(scale.detect_epochs)} on {scale.num_train} annotated images; a second one '
        'started from scratch, all else equal. Both were evaluated by pycocotools on '
        f'{scale.num_val} images of digits and photographs that no training saw.',
        '',
        '| start | box AP | box AP50 | box AP75 | mask AP | mask AP50 | mask AP75 |',
        '|---|---|---|---|---|---|---|',
    ]
    for run, title in RUNS.items():
        values = [
            f'{precision[run][kind][name]:.3f}'
            for kind in _KINDS
            for name in ('AP', 'AP50', 'AP75')
        ]
        lines.append(f'| {title} | {" | ".join(values)} |')
    lines += ['', _verdict(network, precision), '', '## Losses', '']
    lines += ['| run | first logged | last logged |', '|---|---|---|']
    titles = {'pretrain': 'GreenMIM pre-training'}
    titles |= {f'detect_{run}': f'Mask R-CNN, {title}' for run, title in RUNS.items()}
    for name, title in titles.items():
        values = losses[name][1]
        lines.append(f'| {title} | {values[0]:.3f} | {values[-1]:.3f} |')
    lines += [
        '',
        '![loss curves](losses.png)',
        '',
        '## Reconstructions',
        '',
        'Original, masked, painted back: validation images, which pre-training has not seen. What '
        'is painted comes from the network alone.',
        '',
        '![original, masked, painted back](reconstruct/reconstructions.png)',
        '',
        '## Detections',
        '',
        'The first validation images; detections with a score of at least 0.5.',
        '',
        '![truth and detections](detections.png)',
        '',
        '## Time',
        '',
        '| step | minutes |',
        '|---|---|',
    ]
    for step in steps(scale):
        lines.append(f'| {step.title} | {outcomes[step.name].seconds / 60:.1f} |')
    total = sum(outcome.seconds for outcome in outcomes.values())
    lines += [f'| all | {total / 60:.1f} |', '', _machine(), '']
    return '\n'.join(lines)


def _verdict(network: Network, precision: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Whether pre-training helped, whatever came out, and what was to be expected."""
    gains = {
        title: precision['greenmim'][kind]['AP'] - precision['scratch'][kind]['AP']
        for kind, title in _KINDS.items()
    }
    told = ' and '.join(f'{title} AP by {gain:+.3f}' for title, gain in gains.items())
    if all(abs(gain) < 0.02 for gain in gains.values()):
        verdict = 'Pre-training made no clear difference here'
    elif all(gain > 0 for gain in gains.values()):
        verdict = 'Pre-training helped'
    elif all(gain <= 0 for gain in gains.values()):
        verdict = 'Pre-training did not help here'
    else:
        verdict = 'Pre-training helped in part'
    expected = ''
    if network.checkpoint is not None:
        expected = (
            ' Over three seeds the study of docs/evidence.md, which made those weights, measured '
            f'a gain in box AP of {MEASURED_GAIN}.'
        )
    return f'{verdict}: it changed {told}. This is one run with one seed.{expected}'


def _beginning(network: Network) -> str:
    """Where the pre-training's weights came from."""
    if network.checkpoint is None:
        return 'with random weights'
    return (
        f'that the study of docs/evidence.md had pre-trained before ({network.checkpoint}; longer '
        'than a demo may take)'
    )


def _epochs(count: int) -> str:
    return f'{count} epoch{"s" * (count != 1)}'


def _machine() -> str:
    packages = {
        'torch': ('torch',),
        'mmengine': ('onedl-mmengine', 'mmengine'),
        'mmcv': ('onedl-mmcv', 'mmcv'),
        'mmdet': ('onedl-mmdetection', 'mmdet'),
        'mmpretrain': ('onedl-mmpretrain', 'mmpretrain'),
        'pycocotools': ('pycocotools',),
    }
    found = []
    for name, distributions in packages.items():
        for distribution in distributions:
            try:
                found.append(f'{name} {version(distribution)}')
                break
            except PackageNotFoundError:
                continue
    device = 'CPU'
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return (
        f'Measured on {device}, {os.cpu_count()} CPU cores ({platform.machine()}), '
        f'Python {platform.python_version()}, {", ".join(found)}.'
    )
