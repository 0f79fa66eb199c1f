"""Loops of mmengine's runner that classify by nearest neighbours."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from mmengine.dist import all_gather
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner, TestLoop, ValLoop, autocast
from torch import Tensor
from torch.utils.data import DataLoader

from ..registry import LOOPS
from .knn import knn_scores


class _NearestNeighbours:
    """What both loops add to mmengine's: features instead of the model's own predictions."""

    mode: str

    def __init__(
        self, *args, bank_dataloader: dict, k: int = 20, temperature: float = 0.07, **kwargs
    ) -> None:
        super().__init__(*args, **kwargs)
        self.bank_dataloader = Runner.build_dataloader(
            bank_dataloader, seed=self.runner.seed, diff_rank_seed=False
        )
        self.k, self.temperature = k, temperature
        self.classes = _same_classes(self.bank_dataloader, self.dataloader)

    @torch.no_grad()
    def run(self) -> dict:
        """Fill the bank, then classify and score the images of the loop's own data."""
        self.runner.model.eval()
        self.bank, self.labels = self._fill_bank()
        self.runner.logger.info(f'{len(self.bank)} labelled images of {self.classes} classes')
        return super().run()

    def _fill_bank(self) -> tuple[Tensor, Tensor]:
        features, labels = [], []
        for batch in self.bank_dataloader:
            found, samples = self._features(batch)
            features.append(found)
            labels += [sample.gt_label.to(found.device) for sample in samples]
        size = len(self.bank_dataloader.dataset)
        return _gathered(torch.cat(features), size), _gathered(torch.cat(labels), size)

    def _features(self, batch: Any) -> tuple[Tensor, Sequence]:
        """``(B, C)`` features of a batch, averaged over the map, and its samples."""
        model = self.runner.model
        model = model.module if is_model_wrapper(model) else model
        data = model.data_preprocessor(batch, False)
        with autocast(enabled=self.fp16):
            features = model(**data, mode='tensor')
        features = features[-1] if isinstance(features, (tuple, list)) else features
        return features.flatten(2).mean(2) if features.ndim == 4 else features, data['data_samples']

    def run_iter(self, idx: int, data_batch: Any) -> None:
        """Classify a batch."""
        self.runner.call_hook(f'before_{self.mode}_iter', batch_idx=idx, data_batch=data_batch)
        outputs = self.predict(data_batch)
        self.evaluator.process(data_samples=outputs, data_batch=data_batch)
        self.runner.call_hook(
            f'after_{self.mode}_iter', batch_idx=idx, data_batch=data_batch, outputs=outputs
        )

    def predict(self, batch: Any) -> Sequence:
        """Samples of a batch with ``pred_score``, shares of the votes, and ``pred_label``."""
        features, samples = self._features(batch)
        scores = knn_scores(
            features.float(), self.bank.float(), self.labels, self.classes, self.k, self.temperature
        )
        for sample, score in zip(samples, scores, strict=True):
            sample.set_pred_score(score).set_pred_label(score.argmax(keepdim=True))
        return samples


@LOOPS.register_module()
class KNNTestLoop(_NearestNeighbours, TestLoop):
    """Tests frozen features by their nearest neighbours among labelled images.

    The model needs no head: what ``model(inputs, mode='tensor')`` returns is averaged over the
    map. A pre-training model will do, and so will a classifier without head. Predictions are
    scored by any metric of classification, as mmpretrain's ``Accuracy``.

    Args:
        runner: The runner.
        dataloader: Images to classify, labelled for the score.
        evaluator: Metrics.
        bank_dataloader: Labelled images to compare with, in their order.
        k: How many neighbours vote.
        temperature: See :func:`~greenmim_mm.evaluation.knn_scores`.
        fp16: Compute features in half precision.

    Raises:
        ValueError: If both data sets have other classes.

    Example:
        >>> test_cfg = dict(type='greenmim_mm.KNNTestLoop', bank_dataloader=train_dataloader)
        >>> test_evaluator = dict(type='Accuracy', topk=(1, 5))
    """

    mode = 'test'


@LOOPS.register_module()
class KNNValLoop(_NearestNeighbours, ValLoop):
    """:class:`KNNTestLoop` between the epochs of a training, also of a pre-training."""

    mode = 'val'


def _gathered(local: Tensor, size: int) -> Tensor:
    """Rows of all processes in the order of the data set.

    mmengine's sampler deals the images out one by one and repeats the first ones at the end.
    """
    return torch.stack(all_gather(local), dim=1).flatten(0, 1)[:size]


def _same_classes(bank: DataLoader, queries: DataLoader) -> int:
    """Number of classes of two data sets, which must have the same."""
    names = [tuple(_classes(loader)) for loader in (bank, queries)]
    if names[0] != names[1]:
        odd = sorted(set(names[0]) ^ set(names[1])) or ['the same in another order']
        raise ValueError(
            f'the labelled images have {len(names[0])} classes and the images to classify '
            f'{len(names[1])}: both need the same, and these are not in both: '
            + ', '.join(odd[:5])
            + (', ...' if len(odd) > 5 else '')
        )
    return len(names[0])


def _classes(loader: DataLoader) -> Iterable[str]:
    classes = loader.dataset.metainfo.get('classes')
    if not classes:
        raise ValueError(
            f'{type(loader.dataset).__name__} of k-NN has no classes; its images need labels '
            '(with_label=True and a folder for each class, or an ann_file with metainfo.classes)'
        )
    return classes
