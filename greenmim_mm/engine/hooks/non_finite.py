"""Losses that are not finite: where they come from, and the end of the run."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from mmengine.dist import all_reduce, is_distributed
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from ...registry import HOOKS

_NAMED = 8


class NonFiniteLossError(RuntimeError):
    """The loss is not finite; the message says when, with which images and where."""


@HOOKS.register_module()
class NonFiniteLossHook(Hook):
    """End a run whose loss is NaN or infinite a number of times in a row.

    Such steps do not reach the parameters: the loss scaler of mixed precision leaves them out by
    itself, without it they are left out here, by all processes together. What the scaler leaves
    out for its own reasons, with a finite loss, does not count.

    Args:
        max_bad_steps: Bad steps in a row that end the run.

    Raises:
        ValueError: If ``max_bad_steps`` is less than 1.
    """

    def __init__(self, max_bad_steps: int = 3) -> None:
        if max_bad_steps < 1:
            raise ValueError(f'max_bad_steps={max_bad_steps} must be at least 1')
        self.max_bad_steps = max_bad_steps
        self._bad_steps = 0

    def before_train(self, runner: Runner) -> None:
        """Guard the parameters where no loss scaler does."""
        self._bad_steps = 0
        wrapper = runner.optim_wrapper
        if isinstance(wrapper, OptimWrapper) and not isinstance(wrapper, AmpOptimWrapper):
            wrapper.update_params = _guarded(wrapper.update_params)

    def after_train(self, runner: Runner) -> None:
        """Take the guard off."""
        vars(runner.optim_wrapper).pop('update_params', None)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Mapping[str, Any] | None = None,
    ) -> None:
        """Count a bad step.

        Raises:
            NonFiniteLossError: If there were too many in a row.
        """
        loss = torch.as_tensor((outputs or {}).get('loss', 0.0)).detach()
        if bool(loss.isfinite().all()):
            self._bad_steps = 0
            return
        self._bad_steps += 1
        rate = runner.optim_wrapper.get_lr()
        rate = next(iter(rate.values()))[0]
        text = f'the loss is {float(loss.mean()):g} in iteration {runner.iter + 1}'
        text += f' (learning rate {rate:g})'
        if self._bad_steps < self.max_bad_steps:
            runner.logger.warning(f'{text}; the step is left out')
            return
        paths = image_paths(data_batch)
        raise NonFiniteLossError(
            f'{text}, as in the {self._bad_steps - 1} before it; {_origin(runner, data_batch)}; '
            f'images: {", ".join(paths[:_NAMED]) or "unknown"}'
            + (f' and {len(paths) - _NAMED} more' if len(paths) > _NAMED else '')
        )


def first_non_finite(model: nn.Module, forward: Callable[[], Any]) -> str:
    """Run a forward pass and find the first module that makes something bad of good input.

    Args:
        model: Model whose modules are watched.
        forward: Runs it.

    Returns:
        Name of the module; of the first parameter that is not finite, if one is; or empty.
    """
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            return f'parameter {name}'
    found: list[str] = []
    with ExitStack() as stack:
        for name, module in model.named_modules():

            def watch(module, args, output, name=name):
                if not found and not _finite(output):
                    kind = type(module).__name__
                    found.append(f'module {name} ({kind})' if name else f'the model ({kind})')

            # Inner modules end before the outer ones, so that the first is the innermost.
            stack.callback(module.register_forward_hook(watch).remove)
        with torch.no_grad():
            result = forward()
    if not found and not _finite(result):
        found.append('the loss itself, of outputs that are finite')
    return found[0] if found else ''


def image_paths(data_batch: Any) -> list[str]:
    """Paths of the images of a batch, as far as it knows them."""
    samples = data_batch.get('data_samples') if isinstance(data_batch, Mapping) else None
    paths = (getattr(sample, 'img_path', None) for sample in samples or ())
    return [str(path) for path in paths if path]


def _origin(runner: Runner, data_batch: Any) -> str:
    """Where the bad numbers come from, as one more forward pass shows."""
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model

    def forward() -> Any:
        with runner.optim_wrapper.optim_context(model):
            data = model.data_preprocessor(data_batch, True)
            return model(**data, mode='loss')

    try:
        origin = first_non_finite(model, forward)
    # Parts of a sharded model do not run alone; what is known is still to be said.
    except Exception as error:
        return f'another forward pass failed ({type(error).__name__})'
    return f'first bad: {origin}' if origin else 'another forward pass gave a finite loss'


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, Mapping):
        return all(map(_finite, value.values()))
    return not isinstance(value, (list, tuple)) or all(map(_finite, value))


def _guarded(update: Callable[..., None]) -> Callable[..., None]:
    """``update_params`` that leaves steps out whose loss is not finite in any process."""

    def guarded(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        bad = (~loss.detach().isfinite()).any().int()
        if is_distributed():
            all_reduce(bad, 'max')
        if not bool(bad):
            update(loss, *args, **kwargs)

    return guarded
