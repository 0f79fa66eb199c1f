"""What frozen features know: which digit is in a box, by neighbours and by a linear layer."""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torchvision.ops import roi_align

from greenmim_mm.models import GreenSwin

from .data import build_data, normalise, read_boxes
from .design import Cell, Study, StudyError
from .pretrain import milestone_path, milestone_steps
from .results import Places, working_at, write_result

STRIDES = (4, 8, 16, 32)
_BATCH = 50


def probe(study: Study, places: Places, cell: Cell, part: str = 'val') -> list[dict]:
    """Probe the backbone after each milestone of a pre-training.

    Args:
        study: The design.
        places: Where things lie.
        cell: Method and seed.
        part: 'val' for the report; 'dev' for choices, and then no result is written.

    Returns:
        By milestone: ``step``, ``minutes`` and, by stage, accuracies ``neighbours`` and ``linear``.

    Raises:
        StudyError: If the pre-training has not come to its first milestone.
    """
    torch.set_num_threads(1)
    with working_at(places.folder(study, cell)):
        data = build_data(study, places)
        count = study.data.num_val if part == 'val' else study.data.num_dev
        train = read_boxes(data, 'train', study.probe.num_train)
        test = read_boxes(data, part, count)
        found = []
        steps = milestone_steps(study, cell.start, cell.length)
        for step in steps:
            path = milestone_path(study, places, cell.start, cell.seed, step)
            if not path.exists():
                continue
            state = torch.load(path, weights_only=True)
            backbone = load_backbone(study, state['state_dict'])
            stages = [
                accuracies(fit, held, train[2], test[2], study)
                for fit, held in zip(
                    box_features(backbone, train, study.probe.cells),
                    box_features(backbone, test, study.probe.cells),
                    strict=True,
                )
            ]
            found.append(dict(step=step, minutes=round(state['minutes'], 3), stages=stages))
            print(f'{cell.name} {found[-1]}', flush=True)
        if not found:
            raise StudyError(f'{cell.name}: no weights to probe; run its pre-training first')
        if part == 'val' and found[-1]['step'] == steps[-1]:
            write_result(
                places, study, cell, dict(digits=[len(train[2]), len(test[2])], milestones=found)
            )
    return found


def load_backbone(study: Study, weights: dict[str, Tensor]) -> GreenSwin:
    """The dense backbone with the weights of a pre-training model, in eval mode.

    Maps of the first three stages pass a fresh norm: pre-training has one for the last alone.
    """
    settings = study.pretrain
    backbone = GreenSwin(
        dict(settings.arch),
        img_size=study.data.image_size,
        window_size=settings.window_size,
        out_indices=(0, 1, 2, 3),
    )
    own = {
        name.removeprefix('backbone.'): value
        for name, value in weights.items()
        if name.startswith('backbone.') and not name.endswith('mask_token')
    }
    missing, unexpected = backbone.load_state_dict(own, strict=False)
    fresh = {f'norm{stage}.{name}' for stage in range(3) for name in ('weight', 'bias')}
    if unexpected or set(missing) - fresh:
        raise StudyError(f'weights do not fit: missing {missing}, unexpected {unexpected}')
    return backbone.eval()


@torch.no_grad()
def box_features(
    backbone: GreenSwin, boxes: tuple[np.ndarray, Tensor, np.ndarray], cells: int
) -> list[np.ndarray]:
    """Features of each box, a stage at a time.

    Args:
        backbone: Dense, all four stages.
        boxes: What :func:`~.data.read_boxes` returns.
        cells: A box is averaged over ``cells`` x ``cells`` parts.

    Returns:
        By stage float32 ``(K, C * cells ** 2)``.
    """
    images, corners, _ = boxes
    parts = [
        backbone(normalise(images[start : start + _BATCH]))
        for start in range(0, len(images), _BATCH)
    ]
    return [
        roi_align(torch.cat(maps), corners, cells, 1 / stride, sampling_ratio=4, aligned=True)
        .flatten(1)
        .numpy()
        for maps, stride in zip(zip(*parts, strict=True), STRIDES, strict=True)
    ]


def accuracies(
    fit: np.ndarray, held: np.ndarray, fit_digits: np.ndarray, held_digits: np.ndarray, study: Study
) -> dict[str, float]:
    """Share of digits recognised by cosine neighbours and by logistic regression."""
    scaler = StandardScaler().fit(fit)
    fit, held = scaler.transform(fit), scaler.transform(held)
    neighbours = KNeighborsClassifier(study.probe.neighbours, metric='cosine')
    linear = LogisticRegression(C=study.probe.penalty, max_iter=500)
    return {
        name: round(float(classifier.fit(fit, fit_digits).score(held, held_digits)), 4)
        for name, classifier in (('neighbours', neighbours), ('linear', linear))
    }
