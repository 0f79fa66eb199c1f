"""GreenSwinV2: where Swin Transformer V2 differs from V1 (Liu et al., CVPR 2022).

A branch ends with its norm instead of beginning with it, queries and keys are compared by cosine,
a small network computes the position bias from the offset, and patch merging normalises at its
end. Parameters are named as in ``mmpretrain.SwinTransformerV2``.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..archs import SWINV2_ARCHS
from ..ops import (
    coords_windows,
    cosine_scale,
    log_spaced_offsets,
    recompute_obstacle,
    without_autocast,
)
from ..registry import MODELS
from .green_swin import GreenSwin
from .layers import Norm, WindowMSA, cell_order, unfold_order
from .lean import lean

CPB_HIDDEN_DIMS = 512

# Buffers that follow from the window size.
_BUFFERS = ('relative_coords_table', 'relative_position_index')


@MODELS.register_module()
class GreenSwinV2(GreenSwin):
    """Swin Transformer V2 for GreenMIM pre-training and for everything after it.

    The two uses are those of :class:`~greenmim_mm.models.GreenSwin`: ``backbone(images)`` is the
    dense Swin V2, ``backbone(images, mask)`` runs on the visible tokens alone. Groups of windows
    are the same for both; what attention computes inside them differs, and weights serve windows
    of any size. After a change of window size set ``pretrained_window_sizes`` to the windows of
    the pre-training.

    Args:
        arch: 'tiny', 'small', 'base', 'large', 'huge', 'giant', or a dict as for GreenSwin, which
            may have ``extra_norm_every_n_blocks`` (int, 0 for none) as well: every n-th block of
            a stage ends with one more LayerNorm.
        img_size: Usual image side in pixels, or ``(height, width)``.
        window_size: Side of the attention windows in tokens, or one per stage. Unless
            ``pad_small_map`` is set, none may be larger than its map: the position network knows
            no shrunk window.
        pretrained_window_sizes: Windows in pre-training, one per stage; 0 stands for the window
            in use.
        **kwargs: As of :class:`~greenmim_mm.models.GreenSwin`. ``drop_path_rate`` skips a branch
            with its norm, as in Microsoft's code and timm; mmpretrain drops before the norm.

    Raises:
        ValueError: For an argument that makes no sense; the message names it.

    Example:
        >>> backbone = GreenSwinV2('tiny', window_size=8)
        >>> images = torch.rand(2, 3, 256, 256)
        >>> backbone(images)[0].shape
        torch.Size([2, 768, 8, 8])
        >>> mask = torch.rand(64) < 0.75
        >>> backbone(images, mask).shape == (2, int((~mask).sum()), 768)
        True
    """

    archs = SWINV2_ARCHS
    optional_arch_keys = dict(extra_norm_every_n_blocks=0)

    def __init__(
        self,
        arch: str | dict = 'tiny',
        img_size: int | Sequence[int] = 256,
        window_size: int | Sequence[int] = 8,
        pretrained_window_sizes: Sequence[int] = (0, 0, 0, 0),
        **kwargs: Any,
    ) -> None:
        self.pretrained_window_sizes = _check_pretrained(pretrained_window_sizes)
        super().__init__(arch, img_size, window_size=window_size, **kwargs)

    def _attention(
        self, stage: int, qkv_bias: bool, sequential_groups: int | None
    ) -> 'WindowMSAV2':
        return WindowMSAV2(
            self.num_features[stage],
            self.num_heads[stage],
            self.window_sizes[stage],
            qkv_bias,
            sequential_groups,
            self.pretrained_window_sizes[stage],
        )

    def _block_kind(self, number: int) -> dict[str, bool]:
        every = self.arch['extra_norm_every_n_blocks']
        return dict(post_norm=True, extra_norm=every > 0 and (number + 1) % every == 0)

    def _downsample(self, stage: int, norm: Norm) -> nn.Module | None:
        return PatchMergingV2(self.num_features[stage - 1], norm) if stage > 0 else None

    def _merging(self, stage: int) -> nn.Module | None:
        return None if stage + 1 == len(self.stages) else self.stages[stage + 1].downsample

    def _init_from_scratch(self) -> None:
        # As Microsoft's code and timm do: at first a block adds nothing, and learns how much to.
        for block in self.blocks():
            for norm in (block.norm1, block.norm2):
                nn.init.zeros_(norm.weight)
                nn.init.zeros_(norm.bias)

    def _check_map(self, stage: int, grid: tuple[int, int]) -> None:
        window_size = self.window_sizes[stage]
        if not self.pad_small_map and window_size > min(grid):
            fitting = tuple(
                min(size, *((side << stage) >> number for side in grid))
                for number, size in enumerate(self.window_sizes)
            )
            raise ValueError(
                f'window_size={window_size} of stage {stage} is larger than its map of {grid[0]}x'
                f'{grid[1]} tokens; use window_size={fitting}, or pad_small_map=True in a detector'
            )

    def _tell_unused_windows(self) -> None:
        """Nothing: the position network has no rows, and windows larger than a map are refused."""

    def _fit_state_dict(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Buffers follow from the window in use; those of a checkpoint are for another one."""
        for name, buffer in self.named_buffers():
            key = prefix + name
            if not name.endswith(_BUFFERS) or key not in state_dict:
                continue
            if name.endswith(_BUFFERS[0]):
                self._check_offsets(int(name.split('.')[1]), key, state_dict[key])
            state_dict[key] = buffer

    def _check_offsets(self, stage: int, key: str, offsets: Tensor) -> None:
        """Raise ``ValueError`` if a checkpoint's offsets are scaled by another window."""
        own = self.pretrained_window_sizes[stage] or self.window_sizes[stage]
        try:
            window, found = coords_windows(offsets)
        except OverflowError as error:
            raise ValueError(f'{key} of the checkpoint holds no offsets of a Swin V2') from error
        if window > 1 and found != own:  # a window of one token has no offset to scale
            raise ValueError(
                f'{key} of the checkpoint is scaled by a window of {found} in pre-training, this '
                f'{type(self).__name__} by {own}: set pretrained_window_sizes to the windows of '
                f'the pre-training (stage {stage}: {found})'
            )


class WindowMSAV2(WindowMSA):
    """Cosine attention inside windows with continuous relative position bias.

    Args:
        embed_dims: Channels of a token.
        num_heads: Attention heads.
        window_size: Side of a window.
        qkv_bias: Whether queries and values have a bias. Keys have none.
        sequential_groups: Groups whose attention is computed at a time; None: all.
        pretrained_window_size: Side of the window that the position network was trained with; 0
            for ``window_size``.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: int,
        qkv_bias: bool = True,
        sequential_groups: int | None = None,
        pretrained_window_size: int = 0,
    ) -> None:
        super().__init__(embed_dims, num_heads, window_size, qkv_bias, sequential_groups)
        self.register_buffer(
            'relative_coords_table', log_spaced_offsets(window_size, pretrained_window_size)
        )

    def _add_position_bias(self, num_heads: int, window_size: int) -> None:
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10)))
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, CPB_HIDDEN_DIMS),
            nn.ReLU(),
            nn.Linear(CPB_HIDDEN_DIMS, num_heads, bias=False),
        )

    def _add_projection(self, embed_dims: int, qkv_bias: bool) -> None:
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(embed_dims)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(embed_dims)) if qkv_bias else None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """As of :class:`~greenmim_mm.models.layers.WindowMSA`; the bias is no part of the layer."""
        bias = None
        if self.q_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        if lean([(self.qkv, nn.Linear)]):
            return F.linear(x, self.qkv.weight, None if bias is None else bias.detach()), bias
        return self.qkv(x) if bias is None else self.qkv(x) + bias, None

    def cosine_scale(self) -> Tensor:
        """``(heads,)``: what cosines of queries and keys are multiplied by."""
        return cosine_scale(self.logit_scale)

    def position_bias_table(self) -> Tensor:
        """``((2 * w - 1) ** 2, heads)``: bias for each offset in the window, in (0, 16)."""
        # The hidden layer is large beside its input and cheap to make again.
        if torch.is_grad_enabled() and not recompute_obstacle():
            return checkpoint(
                self._position_bias_table, use_reentrant=False, preserve_rng_state=False
            )
        return self._position_bias_table()

    def _position_bias_table(self) -> Tensor:
        with without_autocast(self.logit_scale):
            table = self.cpb_mlp(self.relative_coords_table.to(self.logit_scale.dtype))
            return 16 * table.flatten(0, 2).sigmoid()


class PatchMergingV2(nn.Module):
    """Cells of 2x2 tokens to one token of twice the channels, normalised at the end.

    The reduction has the channel order of ``nn.Unfold``, as in mmpretrain; see
    :class:`~greenmim_mm.models.layers.PatchMerging`.
    """

    def __init__(self, embed_dims: int, norm: Norm) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * embed_dims, 2 * embed_dims, bias=False)
        self.norm = norm(2 * embed_dims)

    def forward(self, cells: Tensor) -> Tensor:
        """``(B, N / 4, 4 * C)`` with the tokens of a cell row by row, to ``(B, N / 4, 2 * C)``."""
        if lean([(self.reduction, nn.Linear)]):
            return self.norm(F.linear(cells, cell_order(self.reduction.weight)))
        return self.norm(self.reduction(unfold_order(cells)))


def _check_pretrained(sizes: Sequence[int]) -> tuple[int, ...]:
    single = not isinstance(sizes, Sequence)
    if single or len(sizes) != 4 or any(not isinstance(s, int) or s < 0 for s in sizes):
        raise ValueError(
            f'pretrained_window_sizes={sizes} must be 4 integers, one per stage; 0 stands for the '
            'window in use'
        )
    return tuple(sizes)
