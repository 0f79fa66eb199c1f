"""Sharding with PyTorch's FSDP, for the strategies in configs/_base_/strategies.

Configs name what is here by its full path, so that nothing of it is imported without need.
"""

from mmengine._strategy import FSDPStrategy as _FSDPStrategy
from mmengine.device import get_device
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ...models.layers import SwinBlock

_OPTIMIZER_KEYS = ('state', 'param_groups')


class FSDPStrategy(_FSDPStrategy):
    """mmengine's strategy with a resume that works.

    mmengine hands the arguments of ``FullyShardedDataParallel.optim_state_dict_to_load`` over in
    the order of PyTorch 2.0, which later versions have changed, and forgets what the optimiser's
    wrapper knows besides the optimiser's state (the loss scale). Arguments are the parent's.
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        if get_device() == 'cpu':
            # There FSDP's move to the CPU copies nothing, and what it had gathered is used again.
            self.state_dict_config.offload_to_cpu = False
            self.optim_state_dict_config.offload_to_cpu = False

    def model_state_dict(self) -> dict:
        """Parameters and buffers; whole in the first process if so set."""
        state = super().model_state_dict()
        for key, value in state.items():
            # Without the attribute that FSDP has set: a file with it is no plain file of tensors.
            state[key] = value.detach()
        return state

    def optim_state_dict(self) -> dict:
        """State of the optimiser and of its wrapper; whole in the first process if so set."""
        return self._wrapper_state() | super().optim_state_dict()

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Load the state of the optimiser; each process takes its part.

        Args:
            state_dict: What :meth:`optim_state_dict` gave.
        """
        # The optimiser's own keys come from a state that FSDP has cut.
        own = FullyShardedDataParallel.optim_state_dict_to_load(
            model=self.model,
            optim=self.optim_wrapper.optimizer,
            optim_state_dict={key: state_dict[key] for key in _OPTIMIZER_KEYS},
        )
        self.optim_wrapper.load_state_dict(state_dict | own)

    def _wrapper_state(self) -> dict:
        state = self.optim_wrapper.state_dict()
        return {key: value for key, value in state.items() if key not in _OPTIMIZER_KEYS}


def wrap_swin_blocks(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """Wrapping policy of FSDP: each block of a GreenSwin or GreenSwinV2 is a unit.

    A process then holds whole parameters of one block, or of two while the next one is fetched,
    and of what lies outside of blocks: embedding, patch merging, norms and decoder.

    Args:
        module: Candidate.
        recurse: Whether FSDP asks for the children to be looked at rather than for ``module``.
        nonwrapped_numel: Parameters of ``module`` that no unit has yet. Not used.

    Returns:
        Whether to look at the children, or to make a unit of ``module``.
    """
    return recurse or isinstance(module, SwinBlock)
