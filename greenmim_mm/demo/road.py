"""The demo: pre-training, conversion and detection, one command of ``tools/`` after another.

Each step is a line that a user could type in the root of the repository.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from .running import Outcome, Step, run_steps

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = 'configs/demo'


@dataclass(frozen=True)
class Network:
    """What the demo pre-trains and puts into a detector.

    Args:
        backbone: Class that is pre-trained.
        detector: The detector's backbone, for people.
        name: Network in the names of the configs.
        weights: Format of the weights that the detector starts from.
        checkpoint: Weights that the pre-training goes on from, None to begin with random ones.
    """

    backbone: str
    detector: str
    name: str
    weights: str
    checkpoint: str | None = None

    @property
    def pretrain(self) -> str:
        """Config of the pre-training."""
        return f'{CONFIGS}/greenmim_{self.name}_1xb16-coslr_digits-128px.py'

    @property
    def detect(self) -> str:
        """Config of the detector."""
        return f'{CONFIGS}/mask-rcnn_{self.name}_fpn_digits-128px.py'


NETWORKS = {
    'swin': Network(
        'GreenSwin',
        "mmdet's own Swin",
        'swin-mini-w4',
        'mmdet',
        f'{CONFIGS}/greenmim_swin-mini-w4_digits-128px.pth',
    ),
    # mmdet has no Swin V2: the detector, too, has this package's.
    'swinv2': Network('GreenSwinV2', 'GreenSwinV2', 'swinv2-mini-w4', 'greenmim_mm'),
}


@dataclass(frozen=True)
class Scale:
    """What the demo does, and how much of everything.

    Args:
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


FULL = Scale('work_dirs/demo', 4000, 100, 200, 2, 48)
QUICK = Scale('work_dirs/demo_quick', 64, 24, 8, 1, 1)


def steps(scale: Scale) -> list[Step]:
    """The demo's steps in order."""
    network, here = scale.network, scale.folder
    # Configs of one network inherit from those of the other.
    configs = tuple(sorted(f'{CONFIGS}/{path.name}' for path in (ROOT / CONFIGS).glob('*.py')))
    pretrained = f'{here}/pretrain/epoch_{scale.pretrain_epochs}.pth'
    start = ''
    if network.checkpoint:  # gently: a full learning rate would undo what it has learnt
        start = f' load_from={network.checkpoint} optim_wrapper.optimizer.lr=1e-4'
    carried = (network.checkpoint,) if network.checkpoint else ()
    samples = ' '.join(f'{here}/data/coco/val/{index:06d}.jpg' for index in range(1, 9))
    return [
        Step(
            'data',
            'build the data: handwritten digits in chalk or ink',
            f'tools/make_demo_data.py {here}/data --overwrite '
            f'--num-unlabelled {scale.num_unlabelled} --num-train {scale.num_train} '
            f'--num-val {scale.num_val}',
            ('meta.json',),
        ),
        Step(
            'pretrain',
            f'pre-train {network.backbone} with GreenMIM on the unlabelled images',
            f'tools/train.py {network.pretrain} --work-dir {here}/pretrain --cfg-options '
            f'train_dataloader.dataset.data_root={here}/data/unlabelled '
            f'train_cfg.max_epochs={scale.pretrain_epochs} '
            f'param_scheduler.1.end={scale.pretrain_epochs}{start}',
            (Path(pretrained).name,),
            ('data',),
            (*configs, *carried),
            resumes=True,
        ),
        Step(
            'reconstruct',
            'paint hidden parts of images that pre-training has not seen',
            f'tools/reconstruct.py {network.pretrain} {pretrained} {samples} '
            f'--out {here}/reconstruct/reconstructions.png --mask-ratio 0.5 --force',
            ('reconstructions.png',),
            ('pretrain',),
            configs,
        ),
        Step(
            'convert',
            'take the backbone out of the pre-training checkpoint',
            f'tools/convert_checkpoint.py {pretrained} {here}/convert/backbone.pth '
            f'--to {network.weights} --force',
            ('backbone.pth',),
            ('pretrain',),
        ),
        *_detector(scale, 'greenmim', 'Mask R-CNN from the GreenMIM weights', configs),
        *_detector(scale, 'scratch', 'the same Mask R-CNN from scratch', configs),
    ]


def _detector(scale: Scale, run: str, title: str, configs: tuple[str, ...]) -> list[Step]:
    """Training and evaluation of a detector."""
    config, here = scale.network.detect, scale.folder
    last = f'epoch_{scale.detect_epochs}.pth'
    inputs, start = ('data',), ''
    if run == 'greenmim':
        inputs = ('data', 'convert')
        start = (
            ' model.backbone.init_cfg.type=Pretrained'
            f' model.backbone.init_cfg.checkpoint={here}/convert/backbone.pth'
        )
    return [
        Step(
            f'detect_{run}',
            f'train {title}',
            f'tools/train.py {config} --work-dir {here}/detect_{run} --cfg-options '
            f'train_dataloader.dataset.data_root={here}/data/coco/ '
            f'train_cfg.max_epochs={scale.detect_epochs} '
            f'param_scheduler.1.end={scale.detect_epochs}{start}',
            (last,),
            inputs,
            configs,
            resumes=True,
        ),
        Step(
            f'test_{run}',
            f'evaluate {title}',
            f'tools/test.py {config} {here}/detect_{run}/{last} --work-dir {here}/test_{run} '
            f'--cfg-options test_dataloader.dataset.data_root={here}/data/coco/ '
            f'test_evaluator.ann_file={here}/data/coco/annotations/instances_val.json '
            f'test_evaluator.outfile_prefix={here}/test_{run}/val',
            ('val.bbox.json', 'val.segm.json'),
            (f'detect_{run}',),
            configs,
        ),
    ]


def run_road(scale: Scale, say: Callable[[str], None], root: Path = ROOT) -> dict[str, Outcome]:
    """Do what is not yet done of the demo.

    Args:
        scale: How much of everything.
        say: Takes lines of progress.
        root: Root of the repository.

    Returns:
        What each step took.

    Raises:
        StepError: If a step fails.
    """
    return run_steps(steps(scale), root / scale.folder, say, root)
