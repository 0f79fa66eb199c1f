"""What the study compares: data, networks, budgets, and the cells of its tables.

Everything that decides about a number stands here as plain frozen data. Its hash is the version
that every result carries: change a setting and the results that depended on it no longer count.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from greenmim_mm.demo import scenes

METHODS = ('greenmim', 'simmim', 'scrambled')
"""Pre-training: ours, the baseline, and ours with the placement of the authors' program."""

STARTS = ('scratch', *METHODS)
NUM_CLASSES = 10


class StudyError(ValueError):
    """The study cannot do what was asked for; the message says why and what to do."""


@dataclass(frozen=True)
class DataSettings:
    """The scenes of :mod:`greenmim_mm.demo.scenes`: how many, and their constants."""

    image_size: int = 128
    seed: int = 0
    num_unlabelled: int = 6000
    num_train: int = 1800  # 600 for each seed of a detector
    num_dev: int = 120
    num_val: int = 400
    scenes: tuple = (
        scenes.DIGIT_HEIGHT,
        scenes.DIGITS_PER_IMAGE,
        scenes.MAX_ROTATION,
        scenes.BACKGROUND_SIDE,
        scenes.BACKGROUND_BLUR,
        scenes.BACKGROUND_CONTRAST,
        scenes.CHALK,
        scenes.INK,
        scenes.TINT,
        scenes.GAP,
    )


@dataclass(frozen=True)
class PretrainSettings:
    """One network and one schedule for all methods; the steps make their minutes equal.

    Args:
        steps: By method. A step of SimMIM took 1.42 times as long as one of GreenMIM, in turn on
            one thread (0.307 s and 0.216 s, medians of ten).
            These are the steps of the first cycle of the learning rate; see :class:`Cell`.
        lr: By method, the peak learning rate of what AdamW trains.
        lr_matrices: The same of what Muon trains.
        milestones: Shares of the first cycle after which the weights are kept; those at the end
            of the other cycles are, too.
    """

    arch: dict = field(
        default_factory=lambda: dict(embed_dims=24, depths=(2, 2, 4, 2), num_heads=(1, 2, 4, 8))
    )
    window_size: int = 4
    mask_ratio: float = 0.5
    decoder: dict = field(
        default_factory=lambda: dict(
            decoder_embed_dim=128,
            decoder_depth=2,
            decoder_num_heads=4,
            position_wavelengths=(4, 40),
            position_scale=2.0,
        )
    )
    batch_size: int = 16
    steps: dict = field(default_factory=lambda: dict(greenmim=1600, scrambled=1600, simmim=1124))
    lr: dict = field(default_factory=lambda: dict(greenmim=4e-4, scrambled=4e-4, simmim=1e-3))
    lr_matrices: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.05
    milestones: tuple = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


@dataclass(frozen=True)
class ProbeSettings:
    """Which digit is in the box? Frozen features, averaged over ``cells`` x ``cells`` of it."""

    num_train: int = 600
    cells: int = 3
    neighbours: int = 10
    penalty: float = 0.01  # scikit-learn's C of the logistic regression


@dataclass(frozen=True)
class DetectSettings:
    """Mask R-CNN of ``configs/demo`` with mmdet's own Swin.

    Args:
        iterations: By number of labels, the length of the schedule.
        lr_mult: By start, what multiplies the backbone's learning rate.
        pretrained_seed: Seed of the pre-training that all detectors of a start begin from.
    """

    batch_size: int = 8
    lr: float = 1e-3
    iterations: dict = field(default_factory=lambda: {50: 300, 100: 500, 300: 1000, 600: 1500})
    lr_mult: dict = field(
        default_factory=lambda: dict(scratch=1.0, greenmim=1.0, simmim=1.0, scrambled=1.0)
    )
    pretrained_seed: int = 0
    evaluations: int = 4  # on the development split while training

    def length(self, labels: int, stretch: float = 1.0) -> int:
        """Iterations of a schedule; 6 a label where the design names none."""
        return round(self.iterations.get(labels, 6 * labels) * stretch)


@dataclass(frozen=True)
class Study:
    """The whole of it."""

    revision: int = 2  # raise it when the code changes what a setting means
    data: DataSettings = DataSettings()
    pretrain: PretrainSettings = PretrainSettings()
    probe: ProbeSettings = ProbeSettings()
    detect: DetectSettings = DetectSettings()
    seeds: tuple[int, ...] = (0, 1, 2)
    labels: tuple[int, ...] = (50, 100, 300, 600)
    lengths: tuple[int, ...] = (1, 2, 4)

    @property
    def images_a_seed(self) -> int:
        """Annotated images that each seed of a detector has for itself."""
        return self.data.num_train // len(self.seeds)


@dataclass(frozen=True)
class Cell:
    """One unit of work: it leaves one result.

    Args:
        kind: 'pretrain', 'probe' or 'detect'.
        start: One of ``STARTS``.
        seed: Seed of the weights, the order of the data and, in a detector, its labelled images.
        labels: Annotated images of a detector; 0 otherwise.
        stretch: Length of a detector's schedule relative to the design's. Twice the length tells
            whether a start had been trained out.
        length: Length of the pre-training relative to the design's, a power of two. The learning
            rate falls to zero at 1, 2, 4, ... times the design's steps and rises again (SGDR,
            Loshchilov and Hutter, ICLR 2017), so that a longer run goes on from a shorter one.
    """

    kind: str
    start: str
    seed: int
    labels: int = 0
    stretch: float = 1.0
    length: int = 1

    def __post_init__(self) -> None:
        starts = STARTS if self.kind == 'detect' else METHODS
        if self.start not in starts:
            raise StudyError(f'start={self.start!r} of {self.kind} must be one of {starts}')
        if self.seed < 0:
            raise StudyError(f'seed={self.seed} must be at least 0; use for example 0')
        if self.length < 1 or self.length & (self.length - 1):
            raise StudyError(f'length={self.length} must be a power of two: 1, 2, 4, ...')
        if self.kind == 'detect' and self.labels < NUM_CLASSES:
            raise StudyError(
                f'labels={self.labels}: a detector of {NUM_CLASSES} classes needs at least as many '
                f'annotated images; use {NUM_CLASSES} or more'
            )

    @property
    def name(self) -> str:
        """Name of the result and of the folder of its state."""
        parts = [self.kind, self.start, f'seed{self.seed}']
        if self.labels:
            parts.append(f'labels{self.labels}')
        if self.stretch != 1.0:
            parts.append(f'x{self.stretch:g}')
        if self.length != 1:
            parts.append(f'long{self.length}')
        return '_'.join(parts)


def version(study: Study, cell: Cell | None = None) -> str:
    """Hash of the settings that decide about a cell's result, or about the data alone.

    Only what the cell stands on counts: another learning rate for SimMIM leaves GreenMIM's results
    valid.
    """
    settings: dict = dict(revision=study.revision, data=asdict(study.data))
    if cell is not None and cell.start != 'scratch':
        pretrain = asdict(study.pretrain)
        settings['pretrain'] = {
            name: value[cell.start] if name in ('steps', 'lr') else value
            for name, value in pretrain.items()
        }
    elif cell is not None:
        settings['arch'] = [study.pretrain.arch, study.pretrain.window_size]
    if cell is not None and cell.kind == 'probe':
        settings['probe'] = asdict(study.probe)
    if cell is not None and cell.kind == 'detect':
        settings['detect'] = asdict(study.detect) | dict(
            iterations=study.detect.length(cell.labels, cell.stretch),
            lr_mult=study.detect.lr_mult[cell.start],
            images_a_seed=study.images_a_seed,
        )
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def cells(study: Study) -> Iterator[Cell]:
    """Every cell of the study, the most telling first; a cell comes after what it stands on."""
    first = study.seeds[0]
    for length in study.lengths:
        for method in ('greenmim', 'simmim'):
            yield Cell('pretrain', method, first, length=length)
            yield Cell('probe', method, first, length=length)
            for seed in study.seeds:
                if method == 'greenmim' and length == 1:
                    yield Cell('detect', 'scratch', seed, 100)
                yield Cell('detect', method, seed, 100, length=length)
    longest = study.lengths[-1]
    yield Cell('detect', 'scratch', first, 100, stretch=2.0)
    yield Cell('detect', 'greenmim', first, 100, stretch=2.0, length=longest)
    for labels in study.labels:
        for seed in study.seeds:
            if labels != 100:
                yield Cell('detect', 'scratch', seed, labels)
                yield Cell('detect', 'greenmim', seed, labels, length=longest)
                yield Cell('detect', 'simmim', seed, labels, length=longest)
    for seed in study.seeds:
        for method in METHODS:
            if seed != first or method == 'scrambled':
                yield Cell('pretrain', method, seed)
                yield Cell('probe', method, seed)
    for seed in study.seeds:
        yield Cell('detect', 'scrambled', seed, 100)
