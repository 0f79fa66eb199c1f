"""Building blocks of GreenSwinV2 where they differ from V1's.

Parameters are named as in ``mmpretrain.SwinTransformerV2``. Swin V2 normalises what a branch
adds to the tokens (res-post-norm) instead of what enters it, compares queries and keys by cosine,
and computes the position bias from the offset (Liu et al., Swin Transformer V2, CVPR 2022).
"""

import math

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..ops import (
    AttentionPlan,
    cosine_qkv,
    gelu_linear,
    group_attention,
    log_spaced_offsets,
    relative_position_index,
)

CPB_HIDDEN_DIMS = 512


class WindowMSAV2(nn.Module):
    """Cosine attention inside windows with continuous relative position bias.

    Args:
        embed_dims: Channels of a token.
        num_heads: Attention heads.
        window_size: Side of a window.
        pretrained_window_size: Side of the window that the position network was trained with; 0
            for ``window_size``.
        qkv_bias: Whether queries and values have a bias. Keys have none.
        sequential_groups: Groups whose attention is computed at a time; None: all.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: int,
        pretrained_window_size: int = 0,
        qkv_bias: bool = True,
        sequential_groups: int | None = None,
    ) -> None:
        super().__init__()
        self.backend = 'recompute'
        self.sequential_groups = sequential_groups
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10)))
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, CPB_HIDDEN_DIMS),
            nn.ReLU(inplace=True),
            nn.Linear(CPB_HIDDEN_DIMS, num_heads, bias=False),
        )
        self.register_buffer(
            'relative_coords_table', log_spaced_offsets(window_size, pretrained_window_size)
        )
        # Not used here: stock Swins expect this buffer in a checkpoint.
        self.register_buffer('relative_position_index', relative_position_index(window_size))
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(embed_dims)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(embed_dims)) if qkv_bias else None
        self.proj = nn.Linear(embed_dims, embed_dims)

    def position_bias_table(self) -> Tensor:
        """``((2 * w - 1) ** 2, heads)``: bias for each offset in the window, in (0, 16)."""
        # The hidden layer is large beside its input and cheap to make again.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return checkpoint(
                self._position_bias_table, use_reentrant=False, preserve_rng_state=False
            )
        return self._position_bias_table()

    def _position_bias_table(self) -> Tensor:
        with torch.autocast(self.logit_scale.device.type, enabled=False):
            table = self.cpb_mlp(self.relative_coords_table.to(self.cpb_mlp[0].weight.dtype))
            return 16 * table.flatten(0, 2).sigmoid()

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)``."""
        bias = None
        if self.q_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = cosine_qkv(F.linear(x, self.qkv.weight, bias), self.logit_scale)
        padding_qkv = None
        if plan.padding is not None and bias is not None:
            padding_qkv = cosine_qkv(bias[None, None], self.logit_scale).flatten()
        x = group_attention(
            qkv,
            self.position_bias_table(),
            plan,
            padding_qkv,
            self.backend,
            self.sequential_groups,
        )
        return self.proj(x)


class ShiftWindowMSAV2(nn.Module):
    """Holds the attention under the name that it has in checkpoints; the plan knows the shift."""

    def __init__(self, **kwargs) -> None:
        super().__init__()
        self.w_msa = WindowMSAV2(**kwargs)

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)``."""
        return self.w_msa(x, plan)


class FFNV2(nn.Module):
    """Two linear layers with GELU between them; the hidden layer is kept before GELU alone.

    Args:
        embed_dims: Channels of a token.
        hidden_dims: Channels between the layers.
    """

    def __init__(self, embed_dims: int, hidden_dims: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Sequential(nn.Linear(embed_dims, hidden_dims), nn.GELU()),
            nn.Linear(hidden_dims, embed_dims),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)``."""
        first, second = self.layers[0][0], self.layers[1]
        return gelu_linear(first(x), second.weight, second.bias)


class SwinBlockV2(nn.Module):
    """Transformer block with window attention whose branches are normalised at their end.

    Args:
        embed_dims: Channels of a token.
        num_heads: Attention heads.
        window_size: Side of a window.
        pretrained_window_size: Side of the window that the position network was trained with; 0
            for ``window_size``.
        mlp_ratio: Width of the MLP over ``embed_dims``.
        qkv_bias: Whether queries and values have a bias.
        extra_norm: Whether the tokens themselves are normalised at the end of the block.
        drop_path: Probability to skip a branch, per image.
        norm_eps: Epsilon of the LayerNorms.
        with_cp: True: keep nothing but the input for the backward pass and compute the block
            again. 'mlp': do so for the branch of the MLP alone.
        sequential_groups: Groups whose attention is computed at a time; None: all.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: int,
        pretrained_window_size: int = 0,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        extra_norm: bool = False,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
        with_cp: bool | str = False,
        sequential_groups: int | None = None,
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.attn = ShiftWindowMSAV2(
            embed_dims=embed_dims,
            num_heads=num_heads,
            window_size=window_size,
            pretrained_window_size=pretrained_window_size,
            qkv_bias=qkv_bias,
            sequential_groups=sequential_groups,
        )
        self.norm1 = nn.LayerNorm(embed_dims, norm_eps)
        self.ffn = FFNV2(embed_dims, int(mlp_ratio * embed_dims))
        self.norm2 = nn.LayerNorm(embed_dims, norm_eps)
        self.norm3 = nn.LayerNorm(embed_dims, norm_eps) if extra_norm else None
        self.drop = DropPath(drop_path)

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)``."""
        if self.with_cp is True and torch.is_grad_enabled() and x.requires_grad:
            return checkpoint(self._forward, x, plan, use_reentrant=False)
        return self._forward(x, plan)

    def _forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        x = x + self.drop(self.norm1(self.attn(x, plan)))
        if self.with_cp == 'mlp' and torch.is_grad_enabled():
            added = checkpoint(self._mlp, x, use_reentrant=False, preserve_rng_state=False)
        else:
            added = self._mlp(x)
        x = x + self.drop(added)
        return x if self.norm3 is None else self.norm3(x)

    def _mlp(self, x: Tensor) -> Tensor:
        return self.norm2(self.ffn(x))


class PatchMergingV2(nn.Module):
    """Cells of 2x2 tokens to one token of twice the channels, normalised at the end.

    The reduction has the channel order of ``nn.Unfold`` (channel first, then place in the cell),
    as in mmpretrain; tokens come cell by cell (place first), so the weight is reordered.
    """

    def __init__(self, embed_dims: int, norm_eps: float) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * embed_dims, 2 * embed_dims, bias=False)
        self.norm = nn.LayerNorm(2 * embed_dims, norm_eps)

    def forward(self, cells: Tensor) -> Tensor:
        """``(B, N / 4, 4 * C)`` with the tokens of a cell row by row, to ``(B, N / 4, 2 * C)``."""
        weight = self.reduction.weight.unflatten(1, (-1, 4)).transpose(1, 2).flatten(1)
        return self.norm(F.linear(cells, weight))
