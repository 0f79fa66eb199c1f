"""Building blocks of GreenSwin: embedding, attention, MLP, block, merging, stage.

Parameters are named as in ``mmdet.SwinTransformer`` and ``mmpretrain.SwinTransformer``. A token
sequence ``(B, N, C)`` here is either the visible tokens of a masked image or all tokens of a
dense map; only :class:`~greenmim_mm.ops.AttentionPlan` knows which.

The ``forward`` of each module is the layer as one would write it down. Where :func:`.lean.lean`
allows, a block takes the module's ``fused`` method instead: the same numbers, less memory.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..ops import (
    AttentionPlan,
    PlanPair,
    gelu_linear,
    group_attention,
    norm_linear,
    relative_position_index,
)
from .arguments import check_types
from .lean import Parts, lean

Norm = Callable[..., nn.LayerNorm]


def layer_norm(norm_cfg: dict | None, eps: float = 1e-5) -> Norm:
    """What makes the norms of a network: channels to LayerNorm.

    Args:
        norm_cfg: ``dict(type='LN', eps=..., requires_grad=...)`` or None.
        eps: Epsilon where ``norm_cfg`` gives none.

    Raises:
        ValueError: For another type or other keys.
    """
    known = norm_cfg is None or isinstance(norm_cfg, dict)
    settings = {'type': 'LN', 'eps': eps, 'requires_grad': True} | (known and norm_cfg or {})
    if not known or settings['type'] != 'LN' or len(settings) > 3:
        raise ValueError(
            f"norm_cfg={norm_cfg} is not supported; use dict(type='LN'), with eps and "
            'requires_grad if needed'
        )
    check_types('a number', **{'norm_cfg.eps': settings['eps']})

    def make(channels: int, **kwargs: Any) -> nn.LayerNorm:
        norm = nn.LayerNorm(channels, settings['eps'], **kwargs)
        return norm.requires_grad_(settings['requires_grad'])

    return make


class PatchEmbed(nn.Module):
    """Patches to tokens: a strided convolution, then LayerNorm.

    Args:
        in_channels: Channels of the image.
        embed_dims: Channels of a token.
        patch_size: Side of a patch in pixels.
        norm: Makes the norm.
    """

    def __init__(self, in_channels: int, embed_dims: int, patch_size: int, norm: Norm) -> None:
        super().__init__()
        self.projection = nn.Conv2d(in_channels, embed_dims, patch_size, patch_size)
        self.norm = norm(embed_dims)

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
        conv = self.projection
        if lean([(conv, nn.Conv2d)]):
            return self.norm(F.linear(patches, conv.weight.flatten(1), conv.bias))
        # An image of one column of patches.
        x = (
            patches.unflatten(2, (conv.in_channels, *conv.kernel_size))
            .transpose(1, 2)
            .flatten(2, 3)
        )
        return self.norm(conv(x).flatten(2).transpose(1, 2))


class WindowMSA(nn.Module):
    """Multi-head self-attention inside windows with relative position bias.

    Args:
        embed_dims: Channels of a token.
        num_heads: Attention heads.
        window_size: Side of a window.
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
        self.backend = 'auto'
        self.sequential_groups = sequential_groups
        self._add_position_bias(num_heads, window_size)
        # Not used here: stock Swins expect this buffer in a checkpoint.
        self.register_buffer('relative_position_index', relative_position_index(window_size))
        self._add_projection(embed_dims, qkv_bias)
        self.proj = nn.Linear(embed_dims, embed_dims)

    def _add_position_bias(self, num_heads: int, window_size: int) -> None:
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * window_size - 1) ** 2, num_heads)
        )

    def _add_projection(self, embed_dims: int, qkv_bias: bool) -> None:
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=qkv_bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens ``(B, N, C)`` to queries, keys and values ``(B, N, 3 * C)``.

        The second result is a bias in them of which attention makes the gradient, or None.
        """
        if not lean([(self.qkv, nn.Linear)]):
            return self.qkv(x), None
        bias = self.qkv.bias
        return F.linear(x, self.qkv.weight, None if bias is None else bias.detach()), bias

    def position_bias_table(self) -> Tensor:
        """``((2 * w - 1) ** 2, heads)``: bias for each offset in the window."""
        return self.relative_position_bias_table

    def cosine_scale(self) -> Tensor | None:
        """``(heads,)``: what cosines of queries and keys are multiplied by; None: no cosines."""
        return None

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        """Attend, ``(B, N, C)`` to ``(B, N, C)``."""
        # The padding token of Swin is zero before the projection.
        x = x if plan.padding is None else F.pad(x, (0, 0, 0, 1))
        return self.attend(*self.project(x), plan)

    def fused(self, norm: nn.LayerNorm, x: Tensor, plan: AttentionPlan) -> Tensor:
        """``self(norm(x), plan)``; the normalised tokens are not kept."""
        weight, bias = self.qkv.weight, self.qkv.bias
        added = None if bias is None else bias.detach()
        qkv = norm_linear(x, norm.weight, norm.bias, norm.eps, weight, added)
        if plan.padding is not None:
            row = weight.new_zeros(len(weight)) if bias is None else added
            qkv = torch.cat([qkv, row.to(qkv.dtype).expand(len(qkv), 1, -1)], dim=1)
        return self.attend(qkv, bias, plan)

    def attend(self, qkv: Tensor, bias: Tensor | None, plan: AttentionPlan) -> Tensor:
        """Attention of what :meth:`project` returned, then the last projection."""
        table, scale = self.position_bias_table(), self.cosine_scale()
        x = group_attention(qkv, table, plan, self.backend, self.sequential_groups, scale, bias)
        return self.proj(x)


class ShiftWindowMSA(nn.Module):
    """Holds the attention under the name that it has in checkpoints; the plan knows the shift."""

    def __init__(self, w_msa: WindowMSA) -> None:
        super().__init__()
        self.w_msa = w_msa

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)``."""
        return self.w_msa(x, plan)


class FFN(nn.Module):
    """Two linear layers with GELU between them.

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
        return self.layers(x)

    def fused(self, norm: nn.LayerNorm | None, x: Tensor) -> Tensor:
        """``self(norm(x))``, or ``self(x)``; of the hidden channels only GELU's input is kept."""
        first, second = self.layers[0][0], self.layers[1]
        if norm is None:
            x = first(x)
        else:
            x = norm_linear(x, norm.weight, norm.bias, norm.eps, first.weight, first.bias)
        return gelu_linear(x, second.weight, second.bias)


class SwinBlock(nn.Module):
    """Transformer block with window attention.

    Args:
        embed_dims: Channels of a token.
        w_msa: The attention.
        norm: Makes the norms.
        mlp_ratio: Width of the MLP over ``embed_dims``.
        drop_path: Probability to skip a branch, per image.
        with_cp: True: keep nothing but the input for the backward pass and compute the block
            again. 'mlp': do so for the branch of the MLP alone.
        recompute: Whether results of norms and activations are computed again in the backward
            pass where layers can be fused.
        post_norm: Whether a branch ends with its norm (Swin V2) instead of beginning with it.
        extra_norm: Whether the tokens themselves are normalised at the end of the block.
    """

    def __init__(
        self,
        embed_dims: int,
        w_msa: WindowMSA,
        norm: Norm,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        with_cp: bool | str = False,
        recompute: bool = True,
        post_norm: bool = False,
        extra_norm: bool = False,
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.recompute = recompute
        self.post_norm = post_norm
        branches = [
            ('norm1', norm(embed_dims)),
            ('attn', ShiftWindowMSA(w_msa)),
            ('norm2', norm(embed_dims)),
            ('ffn', FFN(embed_dims, int(mlp_ratio * embed_dims))),
        ]
        # Listed in the order of their use, as in other Swins: optimisers number parameters.
        for index in (1, 0, 3, 2) if post_norm else (0, 1, 2, 3):
            self.add_module(*branches[index])
        self.norm3 = norm(embed_dims) if extra_norm else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)``."""
        if self.with_cp is True and torch.is_grad_enabled() and x.requires_grad:
            return checkpoint(self._forward, x, plan, use_reentrant=False)
        return self._forward(x, plan)

    def _forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        x = x + self.drop_path(self._attention(x, plan))
        x = x + self.drop_path(self._mlp(x))
        return x if self.norm3 is None else self.norm3(x)

    def _attention(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        if self.post_norm:
            return self.norm1(self.attn(x, plan))
        if self.recompute and lean(self._attention_parts()):
            return self.attn.w_msa.fused(self.norm1, x, plan)
        return self.attn(self.norm1(x), plan)

    def _mlp(self, x: Tensor) -> Tensor:
        if self.with_cp == 'mlp' and torch.is_grad_enabled():
            # Plain layers: recomputation then stops before the last of them.
            return checkpoint(self._plain_mlp, x, use_reentrant=False, preserve_rng_state=False)
        if not (self.recompute and lean(self._mlp_parts())):
            return self._plain_mlp(x)
        if self.post_norm:
            return self.norm2(self.ffn.fused(None, x))
        return self.ffn.fused(self.norm2, x)

    def _plain_mlp(self, x: Tensor) -> Tensor:
        return self.norm2(self.ffn(x)) if self.post_norm else self.ffn(self.norm2(x))

    def _attention_parts(self) -> Parts:
        yield self.norm1, nn.LayerNorm
        yield self.attn, ShiftWindowMSA
        yield self.attn.w_msa, WindowMSA
        yield self.attn.w_msa.qkv, nn.Linear

    def _mlp_parts(self) -> Parts:
        yield self.ffn, FFN
        layers = self.ffn.layers
        yield layers, nn.Sequential
        yield layers[0], nn.Sequential
        if not self.post_norm:
            yield self.norm2, nn.LayerNorm
            yield layers[0][0], nn.Linear
        yield layers[0][1], nn.GELU
        yield layers[1], nn.Linear


class PatchMerging(nn.Module):
    """Cells of 2x2 tokens to one token of twice the channels.

    The parameters have the channel order of ``nn.Unfold`` (channel first, then place in the
    cell), as in mmdet and mmpretrain; tokens come cell by cell (place first). Reordering the
    small parameters costs less than reordering the tokens.
    """

    def __init__(self, embed_dims: int, norm: Norm) -> None:
        super().__init__()
        self.norm = norm(4 * embed_dims)
        self.reduction = nn.Linear(4 * embed_dims, 2 * embed_dims, bias=False)

    def forward(self, cells: Tensor) -> Tensor:
        """``(B, N / 4, 4 * C)`` with the tokens of a cell row by row, to ``(B, N / 4, 2 * C)``."""
        norm = self.norm
        if not lean([(norm, nn.LayerNorm), (self.reduction, nn.Linear)]):
            return self.reduction(norm(unfold_order(cells)))
        scale, offset = (p.view(-1, 4).t().flatten() for p in (norm.weight, norm.bias))
        weight = cell_order(self.reduction.weight)
        return norm_linear(cells, scale, offset, norm.eps, weight, None)


def unfold_order(cells: Tensor) -> Tensor:
    """``(..., 4 * C)`` from cells (place, channel) to ``nn.Unfold``'s order (channel, place)."""
    return cells.unflatten(-1, (4, -1)).transpose(-2, -1).flatten(-2)


def cell_order(unfolded: Tensor) -> Tensor:
    """Inverse of :func:`unfold_order`."""
    return unfolded.unflatten(-1, (-1, 4)).transpose(-2, -1).flatten(-2)


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

    def forward(self, x: Tensor, plans: PlanPair) -> Tensor:
        """Run the blocks (not the merging) with the plans for plain and shifted windows."""
        for index, block in enumerate(self.blocks):
            x = block(x, plans[index % 2])
        return x
