"""Pre-training of the study: one thread, one plain loop, images from an array in memory.

The models are the package's GreenMIM and mmpretrain's SimMIM, with their own losses. The loop is
the study's own, so that both methods are fed alike and time is that of the networks: a runner's
loading of files would cost a third of it at this size.
"""

import math
import os
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from greenmim_mm.models import GreenMIM
from greenmim_mm.ops import UNIT_SIZE, random_mask

from .data import MEAN, STD, build_data, normalise
from .design import Cell, Study
from .results import Places, working_at, write_result

HELD_OUT = 256  # images of the development split on which the loss is followed
_MASKS_HELD_OUT = 8
_CURVE_POINTS = 40
_SAVE_SECONDS = 120.0


class ScrambledGreenMIM(GreenMIM):
    """GreenMIM with the placement of the authors' released program, which is a mistake.

    There the encoder returns visible features row by row, while the decoder takes them to be in
    the order of the noise that drew the mask: a feature lands at the place of another unit, in
    another way at every step.
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.order = np.random.default_rng(0)

    def reconstruct(self, inputs: Tensor, mask: np.ndarray) -> Tensor:
        """As the parent's, the features in the order of a random noise."""
        rows, columns = (side // UNIT_SIZE for side in inputs.shape[-2:])
        features = self.backbone(inputs, mask)
        order = torch.from_numpy(self.order.permutation(features.shape[1]))
        return self.neck(features[:, order], mask, (rows, columns))


def build_model(study: Study, method: str) -> nn.Module:
    """The model of a method, its weights drawn from torch's generator."""
    settings, size = study.pretrain, study.data.image_size
    features = settings.arch['embed_dims'] * 8
    preprocessor = dict(type='SelfSupDataPreprocessor', mean=MEAN, std=STD)
    MMLogger.get_instance('evidence', log_level='ERROR')  # mmengine lists every parameter
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        import mmpretrain.models  # noqa: F401 - registers them

        if method == 'simmim':
            model = MODELS.build(
                dict(
                    type='mmpretrain.SimMIM',
                    data_preprocessor=preprocessor,
                    backbone=dict(
                        type='SimMIMSwinTransformer',
                        arch=dict(settings.arch),
                        img_size=size,
                        drop_path_rate=0.0,
                        stage_cfgs=dict(block_cfgs=dict(window_size=settings.window_size)),
                    ),
                    neck=dict(
                        type='SimMIMLinearDecoder', in_channels=features, encoder_stride=UNIT_SIZE
                    ),
                    head=dict(
                        type='SimMIMHead',
                        patch_size=4,
                        loss=dict(type='PixelReconstructionLoss', criterion='L2', channel=3),
                    ),
                )
            )
        else:
            model = (GreenMIM if method == 'greenmim' else ScrambledGreenMIM)(
                data_preprocessor=preprocessor,
                backbone=dict(
                    type='greenmim_mm.GreenSwin',
                    arch=dict(settings.arch),
                    img_size=size,
                    window_size=settings.window_size,
                    drop_path_rate=0.0,
                ),
                neck=dict(
                    type='greenmim_mm.GreenMIMPretrainDecoder',
                    embed_dim=features,
                    **settings.decoder,
                ),
                head=dict(
                    type='MAEPretrainHead',
                    norm_pix=False,
                    patch_size=UNIT_SIZE,
                    loss=dict(type='PixelReconstructionLoss', criterion='L2'),
                ),
                mask_ratio=settings.mask_ratio,
            )
        model.init_weights()
    return model


def masked_loss(model: nn.Module, images: Tensor, ratio: float, seed: tuple[int, ...]) -> Tensor:
    """Mean squared error on hidden pixels, the same quantity for every method.

    GreenMIM hides the same units in all images of a batch; SimMIM draws a mask for each image, as
    its authors do.
    """
    rows, columns = (side // UNIT_SIZE for side in images.shape[-2:])
    generator = np.random.default_rng(seed)
    if isinstance(model, GreenMIM):
        mask = random_mask(rows * columns, ratio, generator)
        if isinstance(model, ScrambledGreenMIM):
            model.order = generator
        return model.masked_loss(images, mask)
    masks = np.stack([random_mask(rows * columns, ratio, generator) for _ in images])
    units = torch.from_numpy(masks.reshape(-1, rows, columns)).float()
    patches = UNIT_SIZE // 4
    mask = units.repeat_interleave(patches, 1).repeat_interleave(patches, 2)
    prediction = model.neck(model.backbone(images, mask)[-1])
    return model.head.loss(prediction, images, mask)


@torch.no_grad()
def held_out_loss(model: nn.Module, images: Tensor, ratio: float) -> float:
    """Loss on images that no training sees, with the same masks every time."""
    model.eval()
    losses = [
        float(masked_loss(model, part, ratio, (2**31, number)))
        for number, part in enumerate(images.chunk(_MASKS_HELD_OUT))
    ]
    model.train()
    return float(np.mean(losses))


def milestone_steps(study: Study, method: str) -> list[int]:
    """Steps after which the backbone's weights are kept."""
    steps = study.pretrain.steps[method]
    return sorted({round(share * steps) for share in study.pretrain.milestones})


def milestone_path(study: Study, places: Places, method: str, seed: int, step: int) -> Path:
    """File of the model's weights after a step."""
    return places.folder(study, Cell('pretrain', method, seed)) / f'step_{step}.pth'


def learning_rate(study: Study, method: str, step: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    settings = study.pretrain
    peak, steps = settings.lr[method], settings.steps[method]
    if step < settings.warmup:
        return peak * (step + 1) / settings.warmup
    share = (step - settings.warmup) / max(1, steps - settings.warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * share))


def pretrain(study: Study, places: Places, cell: Cell) -> None:
    """Pre-train a cell's network; goes on from its last checkpoint if it was interrupted."""
    folder = places.folder(study, cell)
    with working_at(folder):
        torch.set_num_threads(1)
        data = build_data(study, places)
        images = np.load(data / 'unlabelled.npy', mmap_mode='r')
        held_out = normalise(_first_images(data, 'dev', HELD_OUT))
        result = _train(study, places, cell, images, held_out)
        write_result(places, study, cell, result)


def _first_images(data: Path, part: str, count: int) -> np.ndarray:
    import cv2

    files = sorted((data / 'labelled/coco' / part).glob('*.jpg'))[:count]
    return np.stack([cv2.imread(str(file))[..., ::-1] for file in files])


def _train(study: Study, places: Places, cell: Cell, images: np.ndarray, held_out: Tensor) -> dict:
    settings, method = study.pretrain, cell.start
    steps, batch = settings.steps[method], settings.batch_size
    torch.manual_seed(cell.seed)
    model = build_model(study, method)
    optimizer = _optimizer(model, study)
    curve: list[dict] = []
    step, spent = 0, 0.0
    last = places.folder(study, cell) / 'last.pth'
    if last.exists():
        state = torch.load(last, weights_only=False)
        model.load_state_dict(state['model'])
        optimizer.load_state_dict(state['optimizer'])
        step, spent, curve = state['step'], state['seconds'], state['curve']
    model.train()
    milestones = milestone_steps(study, method)
    every = max(1, steps // _CURVE_POINTS)
    saved = clock = time.process_time()
    losses: list[float] = []
    while True:
        # What follows, up to the optimiser, is watching: it does not count as training time.
        if step % every == 0 or step == steps:
            spent += time.process_time() - clock
            point = dict(step=step, minutes=round(spent / 60, 3), train=_mean(losses))
            if not curve or curve[-1]['step'] < step:
                point['held_out'] = held_out_loss(model, held_out, settings.mask_ratio)
                curve.append(point)
                print(f'{cell.name} {point}', flush=True)
            losses, clock = [], time.process_time()
        if step in milestones:
            spent += time.process_time() - clock
            path = milestone_path(study, places, method, cell.seed, step)
            _save(dict(state_dict=model.state_dict(), minutes=spent / 60), path)
            clock = time.process_time()
        if step == steps:
            break
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(study, method, step)
        # All that is random depends on the seed and the step alone, so a resumed run goes on alike.
        epoch, part = divmod(step, len(images) // batch)
        order = _order(cell.seed, epoch, len(images))
        chosen = np.sort(order[part * batch : (part + 1) * batch])
        seed = (cell.seed, 0, step)
        loss = masked_loss(model, normalise(images[chosen]), settings.mask_ratio, seed)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        step += 1
        if time.process_time() - saved > _SAVE_SECONDS:
            spent += time.process_time() - clock
            _save(
                dict(
                    model=model.state_dict(),
                    optimizer=optimizer.state_dict(),
                    step=step,
                    seconds=spent,
                    curve=curve,
                ),
                last,
            )
            saved = clock = time.process_time()
    return dict(
        steps=steps,
        images=steps * batch,
        minutes=curve[-1]['minutes'],
        held_out=curve[-1]['held_out'],
        curve=curve,
    )


@lru_cache(maxsize=1)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, 1, epoch)).permutation(count)


def _optimizer(model: nn.Module, study: Study) -> torch.optim.Optimizer:
    """AdamW without decay on biases, norms, tables of biases and tokens."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    flat = [p for name, p in named if p.ndim < 2 or name.endswith(('bias_table', 'mask_token'))]
    decayed = [p for _, p in named if not any(p is other for other in flat)]
    groups = [
        dict(params=decayed, weight_decay=study.pretrain.weight_decay),
        dict(params=flat, weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def _mean(values: list[float]) -> float | None:
    return round(float(np.mean(values)), 4) if values else None


def _save(state: dict, path: Path) -> None:
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    torch.save(state, temporary)
    temporary.replace(path)
