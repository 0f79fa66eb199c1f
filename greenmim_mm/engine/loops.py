"""A training loop whose steps may be computed in parts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.dist import is_distributed
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop
from torch import Tensor

from ..registry import LOOPS


class OutOfMemoryError(RuntimeError):
    """A step does not fit into the GPU's memory; the message says what to do.

    Attributes:
        accumulate: In how many parts the step was computed.
    """

    def __init__(self, message: str, accumulate: int) -> None:
        super().__init__(message)
        self.accumulate = accumulate


@LOOPS.register_module()
class MicroBatchTrainLoop(EpochBasedTrainLoop):
    """mmengine's loop over epochs, each iteration computed in ``accumulate`` parts.

    An iteration stays an update of the parameters with the whole batch: schedules, checkpoints,
    the order of the images and the seeds do not know of the parts. (``accumulative_counts`` of an
    optimiser wrapper makes an iteration of each part.) Where memory runs out in a run of one
    process the parts are halved, and the iteration is done again; among several processes the
    others wait for the one that failed, and the run has to be started again.

    Args:
        *args: The parent's.
        accumulate: Parts of a step. No more than there are images are made.
        **kwargs: The parent's.

    Raises:
        ValueError: If ``accumulate`` is less than 1.
        OutOfMemoryError: From ``run`` if not even a single image fits, or a process of several
            runs out of memory.
    """

    def __init__(self, *args: Any, accumulate: int = 1, **kwargs: Any) -> None:
        if accumulate < 1:
            raise ValueError(f'accumulate={accumulate} must be at least 1')
        super().__init__(*args, **kwargs)
        self.accumulate = accumulate

    def run_iter(self, idx: int, data_batch: Mapping[str, Any]) -> None:
        """Do a step, in smaller parts if need be."""
        self.runner.call_hook('before_train_iter', batch_idx=idx, data_batch=data_batch)
        while (outputs := self._try_step(data_batch)) is None:
            torch.cuda.empty_cache()
        self.runner.call_hook(
            'after_train_iter', batch_idx=idx, data_batch=data_batch, outputs=outputs
        )
        self._iter += 1

    def _try_step(self, data_batch: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """Logged values of a step; None if memory ran out and there are now more parts."""
        wrapper = self.runner.optim_wrapper
        try:
            return self._step(data_batch, wrapper)
        except torch.cuda.OutOfMemoryError as error:
            size, parts = batch_size(data_batch), self.accumulate
            if parts >= size:
                raise OutOfMemoryError(
                    'the GPU has no memory for a single image: take a smaller model or '
                    f'--image-size ({error})',
                    parts,
                ) from error
            if is_distributed():
                raise OutOfMemoryError(
                    f'a GPU is out of memory with {-(-size // parts)} images at a time: go on with '
                    f'--resume --accumulate {2 * parts}',
                    parts,
                ) from error
            self.accumulate = 2 * parts
            self.runner.logger.warning(
                f'Out of memory with {-(-size // parts)} images at a time: from now on a step is '
                f'computed in {self.accumulate} parts.'
            )
        # Here the error is gone, and with it what its traceback holds of the graph.
        wrapper.zero_grad()
        return None

    def _step(self, data_batch: Mapping[str, Any], wrapper: OptimWrapper) -> dict[str, Tensor]:
        model, parts = self.runner.model, split_batch(data_batch, self.accumulate)
        if len(parts) == 1:
            return model.train_step(data_batch, optim_wrapper=wrapper)
        before = wrapper._accumulative_counts, wrapper._inner_count, wrapper._max_counts
        # What a part before a failure has left behind must not count.
        wrapper.zero_grad()
        wrapper._accumulative_counts, wrapper._inner_count = len(parts), 0
        wrapper._max_counts = -1
        try:
            logged = [model.train_step(part, optim_wrapper=wrapper) for part in parts]
        finally:
            wrapper._accumulative_counts, wrapper._inner_count, wrapper._max_counts = before
        return {name: torch.stack([step[name] for step in logged]).mean() for name in logged[0]}


def batch_size(data_batch: Mapping[str, Any]) -> int:
    """Images of a batch, as collated: each value is a tensor or a list of them."""
    return len(next(iter(data_batch.values())))


def split_batch(data_batch: Mapping[str, Any], parts: int) -> list[dict[str, Any]]:
    """A batch as that many batches, of sizes that differ by one at most.

    The parts weigh the same in an average: give batches that ``parts`` divides where it matters.

    Args:
        data_batch: Tensors ``(B, ...)`` or sequences of length B by name.
        parts: How many; not more than B are made.
    """
    size = batch_size(data_batch)
    parts = min(parts, size)
    edges = [size * part // parts for part in range(parts + 1)]
    return [
        {name: _cut(value, start, stop) for name, value in data_batch.items()}
        for start, stop in zip(edges[:-1], edges[1:], strict=True)
    ]


def _cut(value: Tensor | Sequence[Any], start: int, stop: int) -> Any:
    return value[start:stop]
