"""The light pixel decoder of GreenMIM: visible features to pixels of all units."""

import math
from functools import lru_cache

import numpy as np
import torch
from mmengine.model import BaseModule
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..ops import UNIT_SIZE, UnitMask, as_unit_mask, to_device
from ..registry import MODELS
from .arguments import check_types
from .layers import layer_norm

# MAE's (He et al., CVPR 2022) and the authors' of GreenMIM.
_WAVELENGTHS = (2 * math.pi, 2 * math.pi * 10000.0)


@MODELS.register_module()
class GreenMIMPretrainDecoder(BaseModule):
    """A few transformer blocks over visible features and mask tokens, then a linear layer.

    Args:
        embed_dim: Channels of the backbone's last stage.
        decoder_embed_dim: Width of the decoder, divisible by 4 and by the heads.
        decoder_depth: Number of transformer blocks.
        decoder_num_heads: Attention heads of a block.
        mlp_ratio: Width of the MLP over ``decoder_embed_dim``.
        patch_size: Side of what a token paints, in pixels: a mask unit.
        in_channels: Channels of the image.
        norm_cfg: ``dict(type='LN', eps=..., requires_grad=...)``.
        position_wavelengths: Shortest and longest wavelength of the position embedding, in mask
            units; MAE's and the authors' if None. Those are made for long rows: on a few units
            most channels hardly change from one place to the next, and the decoder is slow to
            learn where things are. ``(4, 40)`` was far faster on 4 x 4 units (docs/evidence.md).
        position_scale: What the position embedding is multiplied by.
        init_cfg: mmengine's initialisation; Xavier-uniform linear layers if None.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If the width fits neither the heads nor the position embedding, a size is not
            positive, ``norm_cfg`` is of another type, or the wavelengths are not
            ``0 < shortest <= longest``.
    """

    def __init__(
        self,
        embed_dim: int,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 1,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        patch_size: int = UNIT_SIZE,
        in_channels: int = 3,
        norm_cfg: dict | None = None,
        position_wavelengths: tuple[float, float] | None = None,
        position_scale: float = 1.0,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        if init_cfg is None:
            init_cfg = [
                dict(type='Xavier', distribution='uniform', layer='Linear'),
                dict(type='Constant', layer='LayerNorm', val=1.0, bias=0.0),
            ]
        super().__init__(init_cfg)
        check_types(
            'an integer',
            embed_dim=embed_dim,
            decoder_embed_dim=decoder_embed_dim,
            decoder_depth=decoder_depth,
            decoder_num_heads=decoder_num_heads,
            patch_size=patch_size,
            in_channels=in_channels,
        )
        check_types('a number', mlp_ratio=mlp_ratio)
        if min(embed_dim, decoder_embed_dim, decoder_num_heads, patch_size, in_channels) < 1:
            raise ValueError(
                f'embed_dim={embed_dim}, decoder_embed_dim={decoder_embed_dim}, '
                f'decoder_num_heads={decoder_num_heads}, patch_size={patch_size} and '
                f'in_channels={in_channels} must be positive'
            )
        if not 0 < mlp_ratio < float('inf'):
            raise ValueError(f'mlp_ratio={mlp_ratio} must be positive')
        if decoder_embed_dim % 4 or decoder_embed_dim % decoder_num_heads:
            raise ValueError(
                f'decoder_embed_dim={decoder_embed_dim} must be divisible by 4 and by '
                f'decoder_num_heads={decoder_num_heads}'
            )
        shortest, longest = position_wavelengths or _WAVELENGTHS
        if not 0 < shortest <= longest:
            raise ValueError(
                f'position_wavelengths={position_wavelengths} must be (shortest, longest) with '
                '0 < shortest <= longest, such as (4, 40)'
            )
        norm = layer_norm(norm_cfg, eps=1e-6)
        self.embed_dim = embed_dim
        self.position_wavelengths = (float(shortest), float(longest))
        self.position_scale = position_scale
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_blocks = nn.ModuleList(
            Block(
                decoder_embed_dim,
                decoder_num_heads,
                mlp_ratio,
                qkv_bias=True,
                norm_layer=norm,
            )
            for _ in range(decoder_depth)
        )
        self.decoder_norm = norm(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * in_channels)

    def init_weights(self) -> None:
        """Initialise the layers and the mask token."""
        super().init_weights()
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        x: Tensor,
        mask: UnitMask | Tensor | np.ndarray,
        grid: tuple[int, int] | None = None,
        hidden_only: bool = False,
    ) -> Tensor:
        """Paint mask units.

        Args:
            x: ``(B, num_visible, embed_dim)`` features, units in row-major order.
            mask: A :class:`~greenmim_mm.ops.UnitMask`, or bool, True = masked, as the backbone
                takes it; best on the CPU.
            grid: Mask units ``(rows, columns)``; not needed with a UnitMask, which knows them.
            hidden_only: Paint the hidden units alone: what a loss looks at.

        Returns:
            ``(B, L or hidden, patch_size ** 2 * in_channels)``, units in row-major order, pixels
            in the order row, column, channel.

        Raises:
            ValueError: If the mask does not fit ``x`` or ``grid``.
        """
        places, positions, hidden = self._places(x, mask, grid)
        x = self.decoder_embed(x)
        tokens = torch.cat([x, self.mask_token.to(x.dtype).expand(len(x), 1, -1)], dim=1)
        tokens = tokens.index_select(1, places)
        x = torch.add(tokens, positions.to(x.dtype), alpha=self.position_scale)
        for block in self.decoder_blocks:
            x = block(x)
        if hidden_only:
            x = x.index_select(1, hidden)
        return self.decoder_pred(self.decoder_norm(x))

    # Planning is numpy on the CPU: torch.compile takes what follows it.
    @torch.compiler.disable
    def _places(
        self, x: Tensor, mask: UnitMask | Tensor | np.ndarray, grid: tuple[int, int] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Row of each unit in [features, mask token], their positions, and the hidden units."""
        if grid is None and not isinstance(mask, UnitMask):
            raise ValueError('grid=None: a mask that is no UnitMask needs its (rows, columns)')
        mask = as_unit_mask(mask, mask.grid if grid is None else grid, len(x))
        visible = mask.visible_units
        if len(visible) != x.shape[1]:
            raise ValueError(
                f'{x.shape[1]} features for a mask that leaves {len(visible)} units visible'
            )
        places = np.full(len(mask.hidden), len(visible))
        places[visible] = np.arange(len(visible))
        positions = sincos_position_embedding(
            mask.grid, self.mask_token.shape[2], self.position_wavelengths
        )
        return tuple(to_device((places, positions, mask.hidden_units), x.device))


# Numbers are kept and no tensors: what is made under a fake mode serves nobody else.
@lru_cache(maxsize=32)
def sincos_position_embedding(
    grid: tuple[int, int], dim: int, wavelengths: tuple[float, float] = _WAVELENGTHS
) -> np.ndarray:
    """Fixed 2D sine-cosine positions (as MAE, He et al., has them).

    Args:
        grid: Rows and columns.
        dim: Width, divisible by 4.
        wavelengths: Shortest and longest (which is not reached), in places.

    Returns:
        ``(rows * columns, dim)`` float32: sine and cosine of the column, then of the row, at
        wavelengths in geometric progression.
    """
    shortest, longest = wavelengths
    shares = np.arange(dim // 4) / (dim // 4)
    frequency = 2 * math.pi / shortest * (longest / shortest) ** -shares
    row, column = (place.reshape(-1, 1) * frequency for place in np.indices(grid))
    parts = [np.sin(column), np.cos(column), np.sin(row), np.cos(row)]
    return np.concatenate(parts, axis=1).astype(np.float32)
