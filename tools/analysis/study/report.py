"""Tables and figures of what has been computed; what has not is called so."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np

from .design import STARTS, Cell, Study, cells
from .results import Places, read_result, write_atomically

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402 - the backend comes first

TITLES = {
    'scratch': 'from scratch',
    'greenmim': 'GreenMIM',
    'simmim': 'SimMIM',
    'scrambled': 'GreenMIM, places scrambled',
}
COLOURS = {
    'scratch': 'tab:gray',
    'greenmim': 'tab:green',
    'simmim': 'tab:orange',
    'scrambled': 'tab:red',
}
NOT_RUN = 'not run'
_METRICS = {'box_mAP': 'box AP', 'mask_mAP': 'mask AP'}
_STAGES = (1, 2, 3, 4)

Results = Mapping[Cell, Mapping]


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds; the deviation is None for fewer than two."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> 'Spread | None':
        """The spread of some values, None without any."""
        if not values:
            return None
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return cls(float(np.mean(values)), deviation, len(values))

    def __str__(self) -> str:
        spread = '' if self.deviation is None else f' ± {self.deviation:.3f}'
        return f'{self.mean:.3f}{spread} ({self.count})'


def read_all(study: Study, places: Places) -> dict[Cell, dict]:
    """The results of all cells that have one.

    Raises:
        StudyError: If one is of another version of the study.
    """
    found = {cell: read_result(places, study, cell) for cell in cells(study)}
    return {cell: values for cell, values in found.items() if values is not None}


def write_report(study: Study, places: Places) -> Path:
    """Write the tables beside the results and draw the figures.

    Returns:
        The page with the tables.
    """
    results = read_all(study, places)
    images = places.results.parent / 'images'
    images.mkdir(parents=True, exist_ok=True)
    draw_labels(study, results, images / 'evidence_labels.png')
    draw_probes(study, results, images / 'evidence_probes.png')
    draw_curves(study, results, images / 'evidence_curves.png')
    path = places.results / 'README.md'
    write_atomically(path, page(study, results))
    return path


def page(study: Study, results: Results) -> str:
    """The tables as a page."""
    lines = ['# Tables of the study', '']
    lines += [
        'Written by `python tools/analysis/evidence.py report` from the files beside it; '
        '[evidence.md](../evidence.md) says what they mean. Mean ± standard deviation over seeds, '
        'in brackets how many; the gain is that of each seed over scratch with the same labelled '
        'images.',
        '',
    ]
    lines += ['## Mask R-CNN', '']
    lines.append('| labels | start | steps of pre-training | box AP | mask AP | gain, box AP |')
    lines.append('|---|---|---|---|---|---|')
    for labels in study.labels:
        for start in STARTS:
            for length in _lengths(study, start, labels):
                values = {
                    metric: Spread.of(detections(study, results, start, labels, metric, length))
                    for metric in _METRICS
                }
                gain, steps = '', '-'
                if start != 'scratch':
                    gain = Spread.of(gains(study, results, start, labels, length))
                    steps = study.pretrain.steps[start] * length
                row = [labels, TITLES[start], steps, *values.values(), gain]
                lines.append(_row(NOT_RUN if value is None else value for value in row))
    lines += ['', '## Schedules of twice the length', '']
    lines += ['| start | labels | seed | box AP | twice as long |', '|---|---|---|---|---|']
    for cell in cells(study):
        if cell.kind == 'detect' and cell.stretch != 1.0:
            short = results.get(replace(cell, stretch=1.0))
            values = [
                f'{found["box_mAP"]:.3f}' if found else NOT_RUN
                for found in (short, results.get(cell))
            ]
            lines.append(_row([TITLES[cell.start], cell.labels, cell.seed, *values]))
    lines += ['', '## Pre-training', '']
    lines += ['| method | seed | steps | images | minutes, one thread | held-out loss |']
    lines.append('|---|---|---|---|---|---|')
    for cell in cells(study):
        if cell.kind == 'pretrain':
            found = results.get(cell)
            keys = ('steps', 'images', 'minutes', 'held_out')
            steps = study.pretrain.steps[cell.start] * cell.length
            values = [found[key] for key in keys] if found else [steps, *[NOT_RUN] * 3]
            lines.append(_row([TITLES[cell.start], cell.seed, *values]))
    lines += ['', '## Frozen features: which digit is in the box?', '']
    heads = [f'{kind}, stage {stage}' for kind in ('linear', 'k-NN') for stage in _STAGES]
    lines += [_row(['method', 'seed', 'step', 'minutes', *heads]), '|---' * 12 + '|']
    for cell, values in _longest(results, 'probe').items():
        for point in values['milestones']:
            accuracies = [
                f'{stage[kind]:.3f}'
                for kind in ('linear', 'neighbours')
                for stage in point['stages']
            ]
            row = [TITLES[cell.start], cell.seed, point['step'], f'{point["minutes"]:.1f}']
            lines.append(_row([*row, *accuracies]))
    return '\n'.join(lines) + '\n'


def _row(values) -> str:
    return f'| {" | ".join(str(value) for value in values)} |'


def _lengths(study: Study, start: str, labels: int) -> list[int]:
    """Lengths of pre-training that the study has detectors for."""
    return sorted(
        {
            cell.length
            for cell in cells(study)
            if (cell.kind, cell.start, cell.labels, cell.stretch) == ('detect', start, labels, 1.0)
        }
    )


def _longest(results: Results, kind: str) -> Results:
    """Results of a kind, the longest of each start and seed: it has what shorter ones have."""
    found: dict = {}
    for cell in sorted((cell for cell in results if cell.kind == kind), key=lambda c: c.length):
        found[cell.start, cell.seed] = cell
    return {cell: results[cell] for cell in found.values()}


def detections(
    study: Study,
    results: Results,
    start: str,
    labels: int,
    metric: str = 'box_mAP',
    length: int = 1,
) -> list[float]:
    """A metric of the detectors of a start, over the seeds that were run."""
    found = (
        results.get(Cell('detect', start, seed, labels, length=length)) for seed in study.seeds
    )
    return [values[metric] for values in found if values]


def gains(study: Study, results: Results, start: str, labels: int, length: int = 1) -> list[float]:
    """Box AP of a start less that of scratch, over the seeds for which both were run."""
    pairs = (
        (
            results.get(Cell('detect', start, seed, labels, length=length)),
            results.get(Cell('detect', 'scratch', seed, labels)),
        )
        for seed in study.seeds
    )
    return [ours['box_mAP'] - scratch['box_mAP'] for ours, scratch in pairs if ours and scratch]


def draw_labels(study: Study, results: Results, path: Path) -> None:
    """AP by start, against the number of labels and against the minutes of pre-training.

    Bars are standard deviations. Against labels, a start shows its longest pre-training.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout='constrained', sharey=True)
    for start in STARTS:
        points = {
            labels: spread
            for labels in study.labels
            for length in _lengths(study, start, labels)
            if (spread := Spread.of(detections(study, results, start, labels, length=length)))
        }
        _draw_spreads(left, points, start)
        pretrained = {
            length: results.get(
                Cell('pretrain', start, study.detect.pretrained_seed, length=length)
            )
            for length in _lengths(study, start, 100)
            if start != 'scratch'
        }
        points = {
            found['minutes']: spread
            for length, found in pretrained.items()
            if found
            and (spread := Spread.of(detections(study, results, start, 100, length=length)))
        }
        if start == 'scratch' and (found := Spread.of(detections(study, results, start, 100))):
            points = {0.0: found}
        _draw_spreads(right, points, start)
    left.set_xscale('log')
    left.set_xticks(study.labels, [str(labels) for labels in study.labels])
    left.minorticks_off()
    left.set(xlabel='annotated images', xlim=(0.8 * study.labels[0], 1.25 * study.labels[-1]))
    right.set(xlabel='minutes of pre-training, one thread', title='100 annotated images')
    left.set(title='longest pre-training', ylabel='box AP on held-out images', ylim=(0, None))
    for axes in (left, right):
        _tidy(axes)
    _legend(right)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_spreads(axes, points: Mapping[float, Spread], start: str) -> None:
    if points:
        axes.errorbar(
            list(points),
            [spread.mean for spread in points.values()],
            [spread.deviation or 0.0 for spread in points.values()],
            color=COLOURS[start],
            label=TITLES[start],
            marker='o',
            capsize=3,
        )


def draw_probes(study: Study, results: Results, path: Path) -> None:
    """Accuracy on frozen features against the minutes of pre-training, a panel a stage."""
    figure, grid = plt.subplots(
        2, 4, figsize=(12, 5.4), layout='constrained', sharex=True, sharey=True
    )
    for row, (kind, title) in zip(
        grid, (('linear', 'linear probe'), ('neighbours', 'k-NN')), strict=True
    ):
        for stage, axes in enumerate(row):
            for cell, values in _longest(results, 'probe').items():
                points = values['milestones']
                axes.plot(
                    [point['minutes'] for point in points],
                    [point['stages'][stage][kind] for point in points],
                    color=COLOURS[cell.start],
                    label=TITLES[cell.start] if cell.seed == study.seeds[0] else None,
                    marker='.',
                )
            axes.set_title(f'{title}, stage {stage + 1}', fontsize=10)
            _tidy(axes)
    for axes in grid[1]:
        axes.set_xlabel('minutes of one thread')
    for axes in grid[:, 0]:
        axes.set(ylabel='share of digits recognised', ylim=(0, 1))
    _legend(grid[0, 0])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_curves(study: Study, results: Results, path: Path) -> None:
    """Held-out loss of each pre-training; AP of each detector with 100 labels as it trains."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout='constrained')
    told = set()
    detectors = {cell: found for cell, found in results.items() if cell.kind == 'detect'}
    for cell, values in {**_longest(results, 'pretrain'), **detectors}.items():
        first = (cell.kind, cell.start) not in told
        label = TITLES[cell.start] if first else None
        if cell.kind == 'pretrain':
            axes, curve, x, y = left, values['curve'], 'minutes', 'held_out'
        elif cell.labels == 100:
            axes, curve, x, y = right, values['dev'], 'iteration', 'box'
        else:
            continue
        told.add((cell.kind, cell.start))
        points = [point for point in curve if y in point]
        axes.plot(
            [point[x] for point in points],
            [point[y] for point in points],
            color=COLOURS[cell.start],
            label=label,
            alpha=0.8,
            linestyle='-' if cell.stretch == 1.0 else '--',
            marker='.' if axes is right else None,
        )
    left.set(
        title='Pre-training: loss on hidden pixels',
        xlabel='minutes of one thread',
        ylabel='loss on the development split',
    )
    right.set(
        title='Mask R-CNN, 100 labels',
        xlabel='iteration',
        ylabel='box AP on the development split',
        ylim=(0, None),
    )
    for axes in (left, right):
        _tidy(axes)
        _legend(axes)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _tidy(axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)


def _legend(axes) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False)
