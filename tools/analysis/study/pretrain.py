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

from .data import MEAN, STD, build_data, normalise, read_boxes
from .design import Cell, Study, StudyError
from .results import Places, read_result, working_at, write_result

HELD_OUT = 256  # images of the development split on which the loss is followed
_MASKS_HELD_OUT = 8
_CURVE_POINTS = 16
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

    def reconstruct(self, inputs: Tensor, mask: np.ndarray, hidden_only: bool = False) -> Tensor:
        """As the parent's, the features in the order of a random noise."""
        rows, columns = (side // UNIT_SIZE for side in inputs.shape[-2:])
        features = self.backbone(inputs, mask)
        order = torch.from_numpy(self.order.permutation(features.shape[1]))
        return self.neck(features[:, order], mask, (rows, columns), hidden_only=hidden_only)


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


def milestone_steps(study: Study, method: str, length: int = 1) -> list[int]:
    """Steps after which the weights are kept, for a pre-training of a length."""
    steps = study.pretrain.steps[method]
    kept = {round(share * steps) for share in study.pretrain.milestones}
    return sorted(kept | {steps << cycle for cycle in range(1, length.bit_length())})


def milestone_path(study: Study, places: Places, method: str, seed: int, step: int) -> Path:
    """File of the model's weights after a step."""
    return places.folder(study, Cell('pretrain', method, seed)) / f'step_{step}.pth'


def weights_path(study: Study, places: Places, cell: Cell) -> Path:
    """File of the weights that a pre-training ends with; it is there if that was done here."""
    steps = study.pretrain.steps[cell.start] * cell.length
    return milestone_path(study, places, cell.start, cell.seed, steps)


def schedule(study: Study, method: str, step: int) -> float:
    """Share of the peak learning rate that a step has.

    Linear warm-up, then a cosine to zero, in cycles that end at 1, 2, 4, ... times the steps.
    """
    settings = study.pretrain
    steps = settings.steps[method]
    if step >= steps:
        begin = steps << ((step // steps).bit_length() - 1)
        step, steps = step - begin, begin
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    share = (step - settings.warmup) / max(1, steps - settings.warmup)
    return 0.5 * (1 + math.cos(math.pi * share))


def pretrain(study: Study, places: Places, cell: Cell) -> None:
    """Pre-train a cell's network; goes on from its last checkpoint if it was interrupted.

    A result that is there stays: then it is the weights that were wanted.
    """
    recorded = read_result(places, study, cell)
    with working_at(places.folder(study, cell)):
        torch.set_num_threads(1)
        data = build_data(study, places)
        images = np.load(data / 'unlabelled.npy', mmap_mode='r')
        held_out = normalise(read_boxes(data, 'dev', HELD_OUT)[0])
        run = _Run(study, places, cell, images, held_out)
        run.train()
        last = run.curve[-1]
        if recorded is not None:
            print(
                f'{cell.name}: held-out loss {last["held_out"]}, recorded {recorded["held_out"]}; '
                'the result stays as it is'
            )
            return
        values = dict(steps=last['step'], images=last['step'] * study.pretrain.batch_size)
        values |= {name: last[name] for name in ('minutes', 'held_out')}
        write_result(places, study, cell, values | dict(curve=run.curve))


class _Run:
    """A pre-training under way. What is random depends on the seed and the step alone."""

    def __init__(
        self, study: Study, places: Places, cell: Cell, images: np.ndarray, held_out: Tensor
    ) -> None:
        self.study, self.places, self.cell = study, places, cell
        self.images, self.held_out = images, held_out
        torch.manual_seed(cell.seed)
        self.model = build_model(study, cell.start)
        self.optimizers = _optimizers(self.model, study, cell.start)
        self.step, self.seconds = 0, 0.0  # seconds of training alone, not of watching it
        self.curve: list[dict] = []
        self.losses: list[float] = []
        self.file = places.folder(study, cell) / 'last.pth'
        if self.file.exists():
            state = torch.load(self.file, weights_only=False)
            self.model.load_state_dict(state['model'])
            for optimizer, kept in zip(self.optimizers, state['optimizers'], strict=True):
                optimizer.load_state_dict(kept)
            self.step, self.seconds = state['step'], state['seconds']
            self.curve, self.losses = state['curve'], state['losses']

    def train(self) -> None:
        """Train to the end."""
        cycle = self.study.pretrain.steps[self.cell.start]
        steps = cycle * self.cell.length
        every = max(1, cycle // _CURVE_POINTS)
        milestones = milestone_steps(self.study, self.cell.start, self.cell.length)
        self.model.train()
        saved = time.process_time()
        while True:
            if (self.step % every == 0 or self.step in milestones) and (
                not self.curve or self.curve[-1]['step'] < self.step
            ):
                self._watch()
            if self.step in milestones:
                self._keep()
            if self.step >= steps:
                self._save()  # for a longer one
                return
            start = time.process_time()
            self._take_step()
            end = time.process_time()
            self.seconds += end - start
            if end - saved > _SAVE_SECONDS:
                self._save()
                saved = end

    def _take_step(self) -> None:
        settings, seed, step = self.study.pretrain, self.cell.seed, self.step
        share = schedule(self.study, self.cell.start, step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group['lr'] = group['peak'] * share
        batch = settings.batch_size
        epoch, part = divmod(step, len(self.images) // batch)
        order = _order(seed, epoch, len(self.images))
        chosen = np.sort(order[part * batch : (part + 1) * batch])
        images = normalise(self.images[chosen])
        loss = masked_loss(self.model, images, settings.mask_ratio, (seed, 0, step))
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 3.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.losses.append(float(loss.detach()))
        self.step += 1

    def _watch(self) -> None:
        loss = held_out_loss(self.model, self.held_out, self.study.pretrain.mask_ratio)
        point = dict(
            step=self.step,
            minutes=round(self.seconds / 60, 3),
            train=round(float(np.mean(self.losses)), 4) if self.losses else None,
            held_out=round(loss, 5),
        )
        self.losses = []
        self.curve.append(point)
        print(f'{self.cell.name} {point}', flush=True)

    def _keep(self) -> None:
        path = milestone_path(self.study, self.places, self.cell.start, self.cell.seed, self.step)
        _save(dict(state_dict=self.model.state_dict(), minutes=self.seconds / 60), path)

    def _save(self) -> None:
        state = {name: getattr(self, name) for name in ('step', 'seconds', 'curve', 'losses')}
        state['model'] = self.model.state_dict()
        state['optimizers'] = [optimizer.state_dict() for optimizer in self.optimizers]
        _save(state, self.file)


@lru_cache(maxsize=1)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, 1, epoch)).permutation(count)


def _optimizers(model: nn.Module, study: Study, method: str) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between features, AdamW for the rest; their peak rates in the groups.

    Muon (Jordan et al., 2024) came to a loss in half of AdamW's steps and two thirds of its
    minutes. As its authors do, what reads or paints pixels is left to AdamW, and so are norms,
    biases, tables of biases and tokens, which do not decay.

    Raises:
        StudyError: If this torch has no Muon.
    """
    if not hasattr(torch.optim, 'Muon'):
        raise StudyError(f'torch {torch.__version__} has no Muon; pre-train with 2.9 or later')
    settings = study.pretrain
    matrices, pixels, flat = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or name.endswith(('bias_table', 'mask_token')):
            flat.append(parameter)
        elif parameter.ndim == 2 and 'decoder_pred' not in name:
            matrices.append(parameter)
        else:
            pixels.append(parameter)
    peak, decay = settings.lr[method], settings.weight_decay
    muon = [dict(params=matrices, peak=settings.lr_matrices, weight_decay=decay)]
    adamw = [
        dict(params=pixels, peak=peak, weight_decay=decay),
        dict(params=flat, peak=peak, weight_decay=0.0),
    ]
    return [
        torch.optim.Muon(muon, lr=0.0, adjust_lr_fn='match_rms_adamw'),
        torch.optim.AdamW(adamw, lr=0.0, betas=(0.9, 0.95), fused=True),
    ]


def _save(state: dict, path: Path) -> None:
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    torch.save(state, temporary)
    temporary.replace(path)
