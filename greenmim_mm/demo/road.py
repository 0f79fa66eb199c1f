"""The demo: pre-training, conversion and detection, one command of ``tools/`` after another.

Each step is a command that a user could type. A finished step leaves a marker beside its results;
a second call passes over it, an interrupted training resumes, and a step whose command or input
has changed is done anew.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# What is worth showing of a tool's output; all of it goes to the step's log.
_SHOWN = re.compile(r'(Epoch\((?:train|val|test)\).*)|((?:wrote|kept|dropped|demo data).*)')


class StepError(RuntimeError):
    """A step failed; the message says which one and where its log lies."""


@dataclass(frozen=True)
class Step:
    """One command of the demo.

    Attributes:
        name: Name, and folder of the results under the demo's folder.
        title: What the step does, for people.
        command: Script and arguments, run from the root of the repository.
        results: Files that the step must leave, relative to its folder.
        inputs: Names of steps whose results it reads.
        configs: Config files that it reads.
        resumes: Whether the command can go on where it was interrupted (``--resume``).
    """

    name: str
    title: str
    command: tuple[str, ...]
    results: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    configs: tuple[str, ...] = ()
    resumes: bool = False


@dataclass(frozen=True)
class Network:
    """What the demo pre-trains and puts into a detector.

    Attributes:
        backbone: Class that is pre-trained.
        detector: The detector's backbone, for people.
        pretrain: Config of the pre-training.
        detect: Config of the detector.
        weights: Format of the weights that the detector starts from.
    """

    backbone: str
    detector: str
    pretrain: str
    detect: str
    weights: str


NETWORKS = {
    'swin': Network(
        'GreenSwin',
        "mmdet's own Swin",
        'configs/demo/greenmim_swin-mini-w4_1xb32-coslr_digits-128px.py',
        'configs/demo/mask-rcnn_swin-mini-w4_fpn_digits-128px.py',
        'mmdet',
    ),
    # mmdet has no Swin V2: the detector, too, has this package's.
    'swinv2': Network(
        'GreenSwinV2',
        'GreenSwinV2',
        'configs/demo/greenmim_swinv2-mini-w4_1xb32-coslr_digits-128px.py',
        'configs/demo/mask-rcnn_swinv2-mini-w4_fpn_digits-128px.py',
        'greenmim_mm',
    ),
}


@dataclass(frozen=True)
class Scale:
    """What the demo does, and how much of everything.

    Attributes:
        folder: Where all of it goes.
        num_unlabelled: Images for pre-training.
        num_train: Annotated images for training.
        num_val: Annotated images for evaluation.
        pretrain_epochs: Epochs of pre-training.
        detect_epochs: Epochs of each detector's training.
        model: Network, a key of :data:`NETWORKS`.
    """

    folder: str
    num_unlabelled: int
    num_train: int
    num_val: int
    pretrain_epochs: int
    detect_epochs: int
    model: str = 'swin'

    @property
    def network(self) -> Network:
        """The network that ``model`` names."""
        return NETWORKS[self.model]

    def with_model(self, model: str) -> 'Scale':
        """The same with another network, in a folder of its own.

        Raises:
            ValueError: If there is no such network.
        """
        if model not in NETWORKS:
            raise ValueError(f'model={model!r} is unknown; use one of {", ".join(NETWORKS)}')
        if model == self.model:
            return self
        return replace(self, model=model, folder=self.folder.replace('demo', f'demo_{model}', 1))


FULL = Scale('work_dirs/demo', 2000, 600, 150, 5, 5)
QUICK = Scale('work_dirs/demo_quick', 64, 24, 8, 1, 1)


@dataclass
class Outcome:
    """What a step took.

    Attributes:
        seconds: Time of the run, over all calls if it was resumed.
        fresh: Whether it ran in this call.
    """

    seconds: float
    fresh: bool = True


def steps(scale: Scale) -> list[Step]:
    """The road, in order."""
    here, network = scale.folder, scale.network
    # Other networks' configs inherit those of the first.
    first = next(iter(NETWORKS.values()))
    pretrain_configs = tuple(dict.fromkeys((first.pretrain, network.pretrain)))
    detect_configs = tuple(dict.fromkeys((first.detect, network.detect)))
    pretrained = f'{here}/pretrain/epoch_{scale.pretrain_epochs}.pth'
    road = [
        Step(
            'data',
            'compose digits and photographs into images',
            (
                *('tools/make_demo_data.py', f'{here}/data', '--overwrite', '--image-size', '160'),
                *('--num-unlabelled', str(scale.num_unlabelled)),
                *('--num-train', str(scale.num_train), '--num-val', str(scale.num_val)),
            ),
            ('meta.json',),
        ),
        Step(
            'pretrain',
            f'pre-train {network.backbone} with GreenMIM on the unlabelled images',
            (
                *(
                    'tools/train.py',
                    network.pretrain,
                    '--work-dir',
                    f'{here}/pretrain',
                    '--cfg-options',
                ),
                f'train_dataloader.dataset.data_root={here}/data/unlabelled',
                f'train_cfg.max_epochs={scale.pretrain_epochs}',
                f'param_scheduler.1.end={scale.pretrain_epochs}',
            ),
            (f'epoch_{scale.pretrain_epochs}.pth',),
            ('data',),
            pretrain_configs,
            resumes=True,
        ),
        Step(
            'reconstruct',
            'paint hidden parts of images that pre-training has not seen',
            (
                *('tools/reconstruct.py', network.pretrain, pretrained),
                *(f'{here}/data/coco/val/{index:06d}.jpg' for index in range(1, 7)),
                *('--out', f'{here}/reconstruct/reconstructions.png', '--mask-ratio', '0.6'),
                '--force',
            ),
            ('reconstructions.png',),
            ('pretrain',),
            pretrain_configs,
        ),
        Step(
            'convert',
            'take the backbone out of the pre-training checkpoint',
            (
                *('tools/convert_checkpoint.py', pretrained, f'{here}/convert/backbone.pth'),
                *('--to', network.weights, '--force'),
            ),
            ('backbone.pth',),
            ('pretrain',),
        ),
    ]
    starts = {
        'greenmim': ('convert', 'Mask R-CNN from the GreenMIM weights', 'backbone.pth'),
        'scratch': ('data', 'the same Mask R-CNN from scratch', None),
    }
    for name, (source, title, weights) in starts.items():
        options = [
            f'data_root={here}/data/coco/',
            f'train_dataloader.dataset.data_root={here}/data/coco/',
            f'test_dataloader.dataset.data_root={here}/data/coco/',
            f'test_evaluator.ann_file={here}/data/coco/annotations/instances_val.json',
            f'train_cfg.max_epochs={scale.detect_epochs}',
            f'param_scheduler.1.end={scale.detect_epochs}',
        ]
        if weights:
            options += [
                'model.backbone.init_cfg.type=Pretrained',
                f'model.backbone.init_cfg.checkpoint={here}/convert/{weights}',
            ]
        last = f'epoch_{scale.detect_epochs}.pth'
        folder = f'{here}/detect_{name}'
        road += [
            Step(
                f'detect_{name}',
                f'train {title}',
                ('tools/train.py', network.detect, '--work-dir', folder, '--cfg-options', *options),
                (last,),
                tuple(dict.fromkeys(('data', source))),
                detect_configs,
                resumes=True,
            ),
            Step(
                f'test_{name}',
                f'evaluate {title}',
                (
                    *('tools/test.py', network.detect, f'{folder}/{last}'),
                    *('--work-dir', f'{here}/test_{name}', '--cfg-options', *options),
                    f'test_evaluator.outfile_prefix={here}/test_{name}/val',
                ),
                ('val.bbox.json', 'val.segm.json'),
                (f'detect_{name}',),
                detect_configs,
            ),
        ]
    return road


def run_road(scale: Scale, say: Callable[[str], None], root: Path = ROOT) -> dict[str, Outcome]:
    """Do what is not yet done.

    Args:
        scale: How much of everything.
        say: Takes lines of progress.
        root: Root of the repository.

    Returns:
        What each step took.

    Raises:
        StepError: If a step fails.
    """
    outcomes: dict[str, Outcome] = {}
    digests: dict[str, str] = {}
    road = steps(scale)
    for number, step in enumerate(road, 1):
        folder = root / scale.folder / step.name
        notes = _Notes(root / scale.folder / 'steps', step.name)
        digest = digests[step.name] = _digest(step, digests, root)
        marker = notes.read()
        head = f'[{number}/{len(road)}] {step.title}'
        complete = all((folder / name).is_file() for name in step.results)
        if marker.get('digest') == digest and marker.get('done') and complete:
            took = _clock(marker['seconds'])
            say(f'{head}: already there ({took}), in {scale.folder}/{step.name}')
            outcomes[step.name] = Outcome(marker['seconds'], fresh=False)
            continue
        spent, resume = 0.0, False
        if marker.get('digest') == digest and step.resumes:
            spent, resume = marker.get('seconds', 0.0), (folder / 'last_checkpoint').is_file()
        elif folder.exists():
            shutil.rmtree(folder)
        say(f'{head}{": resumes" * resume}')
        folder.mkdir(parents=True, exist_ok=True)
        seconds = _run(step, notes, digest, resume, spent, say, root)
        missing = [name for name in step.results if not (folder / name).is_file()]
        if missing:
            raise StepError(f'step {step.name} ended without {missing}; see {notes.log}')
        notes.write(digest=digest, seconds=seconds, done=True)
        say(f'    done in {_clock(seconds)}')
        outcomes[step.name] = Outcome(seconds)
    return outcomes


def _run(
    step: Step,
    notes: '_Notes',
    digest: str,
    resume: bool,
    spent: float,
    say: Callable[[str], None],
    root: Path,
) -> float:
    """Run the command of a step; returns the seconds that it took, earlier calls included."""
    script, first, *rest = step.command
    # Neither before the config nor last: --resume and --cfg-options take what follows them.
    command = [sys.executable, script, first, *['--resume'] * resume, *rest]
    environment = dict(os.environ, PYTHONUNBUFFERED='1')
    # Threads that spin for each other starve where cores are shared. A shorter spin was as fast
    # as the default on an idle machine; how much it helps on a busy one has not been measured.
    environment.setdefault('GOMP_SPINCOUNT', '20000')
    start = time.monotonic()
    notes.write(digest=digest, seconds=spent, done=False)
    lines: list[str] = []
    with open(notes.log, 'a', encoding='utf-8') as log:
        log.write(f'$ {" ".join(command)}\n')
        with subprocess.Popen(
            command,
            cwd=root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors='replace',
        ) as process:
            try:
                for line in process.stdout:
                    log.write(line)
                    log.flush()
                    lines = [*lines[-14:], line.rstrip()]
                    if match := _SHOWN.search(line):
                        say(f'    {_shorten(match.group())}')
            except BaseException:  # an interrupt, too, must not leave the tool running
                process.terminate()
                raise
            finally:
                seconds = spent + time.monotonic() - start
                notes.write(digest=digest, seconds=seconds, done=False)
    if process.returncode:
        tail = '\n'.join(f'    | {line}' for line in lines)
        raise StepError(
            f'step {step.name} failed with exit code {process.returncode}; its log is '
            f'{notes.log} and ends with\n{tail}'
        )
    return seconds


def _digest(step: Step, digests: dict[str, str], root: Path) -> str:
    """Hash of all that decides about a step's results, but for the code."""
    parts = [*step.command, *(digests[name] for name in step.inputs)]
    parts += [(root / config).read_text(encoding='utf-8') for config in step.configs]
    return hashlib.sha256('\0'.join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class _Notes:
    """What is remembered of a step: its state, and all that its command printed."""

    folder: Path
    name: str

    @property
    def log(self) -> Path:
        return self.folder / f'{self.name}.log'

    def read(self) -> dict:
        try:
            return json.loads((self.folder / f'{self.name}.json').read_text(encoding='utf-8'))
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def write(self, **values) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f'{self.name}.json.tmp'
        temporary.write_text(json.dumps(values), encoding='utf-8')
        temporary.replace(self.folder / f'{self.name}.json')


def _shorten(line: str) -> str:
    """A log line of mmengine without what only debugging needs."""
    line = re.sub(r'(base_lr|data_time|grad_norm|memory|loss_\w+|acc): \S+\s*', '', line)
    return re.sub(r'\s+', ' ', line).strip()


def _clock(seconds: float) -> str:
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d} min'
