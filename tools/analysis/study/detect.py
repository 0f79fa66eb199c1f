"""Mask R-CNN on few labels, by mmengine's runner from the demo's config."""

import json
from pathlib import Path

from mmengine.config import Config
from mmengine.runner import Runner

from .data import build_data
from .design import Cell, Study, StudyError
from .export import carried_weights
from .pretrain import weights_path
from .results import ROOT, Places, working_at, write_result

CONFIG = ROOT / 'configs/demo/mask-rcnn_swin-mini-w4_fpn_digits-128px.py'
_METRICS = {
    f'{kind}_{name}': f'coco/{key}_{name}'
    for kind, key in (('box', 'bbox'), ('mask', 'segm'))
    for name in ('mAP', 'mAP_50', 'mAP_75')
}


def detect(study: Study, places: Places, cell: Cell, report: bool = True) -> dict:
    """Train a cell's detector and test it; goes on from its last checkpoint.

    Args:
        study: The design.
        places: Where things lie.
        cell: Start, seed, number of labels and length of the schedule.
        report: Test on the reported split and write the result. Otherwise nothing but the
            development split is looked at, for choices.

    Returns:
        The result's values; without ``report`` the curve alone.

    Raises:
        StudyError: If the weights of the start are not there, or there are not so many labels.
    """
    folder = places.folder(study, cell)
    with working_at(folder):
        cfg = build_config(study, places, cell)
        runner = Runner.from_cfg(cfg)
        runner.train()
        values = dict(iterations=cfg.train_cfg.max_iters, dev=read_curve(folder))
        if report:
            metrics = runner.test()
            if start := cfg.model.backbone.get('init_cfg'):
                values['weights'] = Path(start.checkpoint).name
            values |= {name: metrics[key] for name, key in _METRICS.items()}
            write_result(places, study, cell, values)
    return values


def build_config(study: Study, places: Places, cell: Cell) -> Config:
    """The demo's config with a cell's data, start and schedule."""
    settings, data = study.detect, build_data(study, places)
    per_seed = study.images_a_seed
    if cell.labels > per_seed:
        raise StudyError(
            f'labels={cell.labels}: the study has {per_seed} annotated images a seed; use at most '
            'so many, or raise num_train of its data'
        )
    iterations = settings.length(cell.labels, cell.stretch)
    cfg = Config.fromfile(CONFIG)
    coco = f'{data}/labelled/coco/'
    cfg.work_dir = str(places.folder(study, cell))
    cfg.experiment_name = cell.name
    cfg.resume = True
    cfg.randomness = dict(seed=cell.seed)
    cfg.log_processor.by_epoch = False
    first = per_seed * (cell.seed % len(study.seeds))
    cfg.train_dataloader.update(batch_size=settings.batch_size, num_workers=0)
    cfg.train_dataloader.persistent_workers = False
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    cfg.train_dataloader.dataset.update(
        data_root=coco, indices=list(range(first, first + cell.labels))
    )
    cfg.test_dataloader.update(batch_size=10, num_workers=0, persistent_workers=False)
    cfg.test_dataloader.dataset.data_root = coco
    cfg.val_dataloader = cfg.test_dataloader.to_dict()
    cfg.val_dataloader['dataset'].update(
        ann_file='annotations/instances_dev.json', data_prefix=dict(img='dev/')
    )
    cfg.test_evaluator.ann_file = f'{coco}annotations/instances_val.json'
    cfg.test_evaluator.outfile_prefix = str(places.folder(study, cell) / 'val')
    cfg.val_evaluator = {
        **cfg.test_evaluator.to_dict(),
        'ann_file': f'{coco}annotations/instances_dev.json',
        'outfile_prefix': None,
    }
    interval = max(1, iterations // settings.evaluations)
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=iterations, val_interval=interval)
    cfg.val_cfg = dict(type='ValLoop')
    cfg.param_scheduler = [
        dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
        dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=0, end=iterations),
    ]
    cfg.default_hooks.logger.update(interval=20, log_metric_by_epoch=False)
    cfg.default_hooks.checkpoint = dict(
        type='CheckpointHook', by_epoch=False, interval=interval, max_keep_ckpts=1
    )
    cfg.optim_wrapper.optimizer.lr = settings.lr
    cfg.optim_wrapper.paramwise_cfg.custom_keys.backbone = dict(
        lr_mult=settings.lr_mult[cell.start]
    )
    if cell.start != 'scratch':
        seed, length = settings.pretrained_seed, cell.length
        weights = weights_path(study, places, Cell('pretrain', cell.start, seed, length=length))
        if not weights.exists():
            # One pre-training is carried by the repository, in half precision.
            weights = carried_weights(study, cell.start, seed, length) or weights
        if not weights.exists():
            raise StudyError(
                f'{cell.name}: no weights {weights}; run evidence.py pretrain --start {cell.start} '
                f'--seed {seed} --length {length} first, also where its result is recorded'
            )
        cfg.model.backbone.init_cfg = dict(
            type='Pretrained', checkpoint=str(weights), prefix='backbone.'
        )
    return cfg


def read_curve(folder: Path) -> list[dict]:
    """Losses and the AP on the development split over a run's iterations, its calls joined."""
    curve: dict[int, dict] = {}
    for file in sorted(folder.glob('*/vis_data/scalars.json')):
        for line in file.read_text(encoding='utf-8').splitlines():
            entry = json.loads(line)
            point = curve.setdefault(entry['step'], dict(iteration=entry['step']))
            if 'loss' in entry:
                point['loss'] = round(entry['loss'], 4)
            if 'coco/bbox_mAP' in entry:
                point |= dict(box=entry['coco/bbox_mAP'], mask=entry['coco/segm_mAP'])
    return [curve[step] for step in sorted(curve)]
