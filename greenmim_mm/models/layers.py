"""Building blocks of GreenSwin: embedding, attention, MLP, block, merging, stage.

Parameters are named as in ``mmdet.SwinTransformer`` and ``mmpretrain.SwinTransformer``. A token
sequence ``(B, N, C)`` here is either the visible tokens of a masked image or all tokens of a
dense map; only :class:`~greenmim_mm.ops.AttentionPlan` knows which.
"""

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..ops import (
    AttentionPlan,
    gelu_linear,
    group_attention,
    norm_linear,
    norm_mlp,
    relative_position_index,
)


class PatchEmbed(nn.Module):
    """Patches to tokens: a strided convolution, then LayerNorm.

    Args:
        in_channels: Channels of the image.
        embed_dims: Channels of a token.
        patch_size: Side of a patch in pixels.
        norm_eps: Epsilon of the LayerNorm.
    """

    def __init__(self, in_channels: int, embed_dims: int, patch_size: int, norm_eps: float) -> None:
        super().__init__()
        self.projection = nn.Conv2d(in_channels, embed_dims, patch_size, patch_size)
        self.norm = nn.LayerNorm(embed_dims, norm_eps)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """``(B, C, H, W)`` to ``(B, rows * columns, D)`` and the grid; pads to whole patches."""
        patch = self.projection.kernel_size[0]
        height, width = images.shape[-2:]
        if height % patch or width % patch:
            images = F.pad(images, (0, -width % patch, 0, -height % patch))
        x = self.projection(images)
        return self.norm(x.flatten(2).transpose(1, 2)), tuple(x.shape[-2:])

    def forward_patches(self, patches: Tensor) -> Tensor:
        """Flat patches ``(B, N, C * patch_size ** 2)`` to tokens ``(B, N, D)``."""
        weight = self.projection.weight.flatten(1)
        return self.norm(F.linear(patches, weight, self.projection.bias))


class WindowMSA(nn.Module):
    """Multi-head self-attention inside windows with relative position bias.

    Args:
        embed_dims: Channels of a token.
        num_heads: Attention heads.
        window_size: Side of the window that the bias table covers.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        sequential_groups: Groups whose attention is computed at a time; None: all.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: int,
        qkv_bias: bool = True,
        sequential_groups: int | None = None,
    ) -> None:
        super().__init__()
        self.sequential_groups = sequential_groups
        self.backend = 'recompute'
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * window_size - 1) ** 2, num_heads)
        )
        # Not used here: stock Swins expect this buffer in a checkpoint.
        self.register_buffer('relative_position_index', relative_position_index(window_size))
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=qkv_bias)
        self.proj = nn.Linear(embed_dims, embed_dims)

    def forward(self, x: Tensor, norm: nn.LayerNorm, plan: AttentionPlan) -> Tensor:
        """Normalise and attend, ``(B, N, C)`` to ``(B, N, C)``."""
        qkv = norm_linear(x, norm.weight, norm.bias, norm.eps, self.qkv.weight, self.qkv.bias)
        x = group_attention(
            qkv,
            self.relative_position_bias_table,
            plan,
            self.qkv.bias,
            self.backend,
            self.sequential_groups,
        )
        return self.proj(x)


class ShiftWindowMSA(nn.Module):
    """Window attention and stochastic depth; the plan decides about the shift."""

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: int,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        sequential_groups: int | None = None,
    ) -> None:
        super().__init__()
        self.w_msa = WindowMSA(embed_dims, num_heads, window_size, qkv_bias, sequential_groups)
        self.drop = DropPath(drop_path)

    def forward(self, x: Tensor, norm: nn.LayerNorm, plan: AttentionPlan) -> Tensor:
        """Normalise and attend, ``(B, N, C)`` to ``(B, N, C)``."""
        return self.drop(self.w_msa(x, norm, plan))


class FFN(nn.Module):
    """Two linear layers with GELU between them, and stochastic depth.

    Args:
        embed_dims: Channels of a token.
        hidden_dims: Channels between the layers.
        drop_path: Probability to skip the branch, per image.
        recompute: Make the hidden channels again in the backward pass instead of keeping them.
    """

    def __init__(
        self, embed_dims: int, hidden_dims: int, drop_path: float = 0.0, recompute: bool = False
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.layers = nn.Sequential(
            nn.Sequential(nn.Linear(embed_dims, hidden_dims), nn.GELU()),
            nn.Linear(hidden_dims, embed_dims),
        )
        self.drop = DropPath(drop_path)

    def forward(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """Normalise and transform, ``(B, N, C)`` to ``(B, N, C)``."""
        first, second = self.layers[0][0], self.layers[1]
        head = (x, norm.weight, norm.bias, norm.eps, first.weight, first.bias)
        tail = (second.weight, second.bias)
        if self.recompute:
            return self.drop(norm_mlp(*head, *tail))
        return self.drop(gelu_linear(norm_linear(*head), *tail))


class SwinBlock(nn.Module):
    """Pre-norm transformer block with window attention.

    Args:
        embed_dims: Channels of a token.
        num_heads: Attention heads.
        window_size: Side of a window.
        mlp_ratio: Width of the MLP over ``embed_dims``.
        qkv_bias: Whether queries, keys and values have a bias.
        drop_path: Probability to skip a branch, per image.
        norm_eps: Epsilon of the LayerNorms.
        with_cp: True: keep nothing but the input for the backward pass and compute the block
            again. 'mlp': do so for the hidden channels of the MLP alone.
        sequential_groups: Groups whose attention is computed at a time; None: all.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
        with_cp: bool | str = False,
        sequential_groups: int | None = None,
    ) -> None:
        super().__init__()
        self.with_cp = with_cp is True
        self.norm1 = nn.LayerNorm(embed_dims, norm_eps)
        self.attn = ShiftWindowMSA(
            embed_dims, num_heads, window_size, qkv_bias, drop_path, sequential_groups
        )
        self.norm2 = nn.LayerNorm(embed_dims, norm_eps)
        self.ffn = FFN(embed_dims, int(mlp_ratio * embed_dims), drop_path, with_cp == 'mlp')

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)``."""
        if self.with_cp and torch.is_grad_enabled() and x.requires_grad:
            return checkpoint(self._forward, x, plan, use_reentrant=False)
        return self._forward(x, plan)

    def _forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        x = x + self.attn(x, self.norm1, plan)
        return x + self.ffn(x, self.norm2)


class PatchMerging(nn.Module):
    """Cells of 2x2 tokens to one token of twice the channels.

    The parameters have the channel order of ``nn.Unfold`` (channel first, then place in the
    cell), as in mmdet and mmpretrain; tokens come cell by cell (place first). Reordering the
    small parameters costs less than reordering the tokens.
    """

    def __init__(self, embed_dims: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * embed_dims, norm_eps)
        self.reduction = nn.Linear(4 * embed_dims, 2 * embed_dims, bias=False)

    def forward(self, cells: Tensor) -> Tensor:
        """``(B, N / 4, 4 * C)`` with the tokens of a cell row by row, to ``(B, N / 4, 2 * C)``."""
        scale, offset = (p.view(-1, 4).t().flatten() for p in (self.norm.weight, self.norm.bias))
        reduction = self.reduction.weight.unflatten(1, (-1, 4)).transpose(1, 2).flatten(1)
        return norm_linear(cells, scale, offset, self.norm.eps, reduction, None)


class SwinStage(nn.Module):
    """Blocks of one resolution, every second one shifted; patch merging lies here as well.

    Args:
        blocks: The blocks.
        downsample: Patch merging to the next stage (Swin V1) or to this one (V2), or None.
    """

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor, plans: tuple[AttentionPlan, AttentionPlan]) -> Tensor:
        """Run the blocks (not the merging) with the plans for plain and shifted windows."""
        for index, block in enumerate(self.blocks):
            x = block(x, plans[index % 2])
        return x
