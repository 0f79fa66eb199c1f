"""The norm of the gradients in the log."""

from functools import partial
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import Tensor

from ...registry import HOOKS


@HOOKS.register_module()
class GradientNormHook(Hook):
    """Log the norm of all gradients before each update, as ``grad_norm``.

    Where gradients are clipped mmengine does that, and this hook does nothing. What is updated is
    measured: not the steps that mixed precision leaves out, and of sharded parameters the shard.
    """

    def __init__(self) -> None:
        self._handle: Any = None

    def before_train(self, runner: Runner) -> None:
        """Watch the optimiser."""
        wrapper = runner.optim_wrapper
        if isinstance(wrapper, OptimWrapper) and not wrapper.clip_grad_kwargs:
            self._handle = wrapper.optimizer.register_step_pre_hook(
                partial(_log_norm, runner.message_hub)
            )

    def after_train(self, runner: Runner) -> None:
        """Watch no more."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """L2 norm of gradients of any shape, taken together; float32 at least."""
    norms = torch._foreach_norm([g.float() if g.element_size() < 4 else g for g in gradients])
    return torch.linalg.vector_norm(torch.stack([norm.float() for norm in norms]))


def _log_norm(hub: MessageHub, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    gradients = [p.grad for group in optimizer.param_groups for p in group['params']]
    gradients = [gradient for gradient in gradients if gradient is not None]
    if gradients:
        hub.update_scalar('train/grad_norm', gradient_norm(gradients))
