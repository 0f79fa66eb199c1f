"""GreenSwin: Swin Transformer that runs on all tokens, or on the visible tokens alone."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from mmengine.logging import MMLogger
from mmengine.model import BaseModule
from mmengine.model.weight_init import trunc_normal_
from torch import Tensor, nn

from ..checkpoint import load_backbone_state_dict, resize_bias_table
from ..ops import (
    AttentionPlan,
    as_unit_mask,
    dense_plan,
    grouped_plan,
    merge_cells,
    unit_grid,
    visible_patches,
    visible_tokens,
    window_grid,
)
from ..registry import MODELS
from .layers import PatchEmbed, PatchMerging, SwinBlock, SwinStage

PATCH_SIZE = 4

Plans = tuple[AttentionPlan, AttentionPlan]

ARCHS = {
    'tiny': dict(embed_dims=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    'small': dict(embed_dims=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    'base': dict(embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    'large': dict(embed_dims=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
}


@MODELS.register_module()
class GreenSwin(BaseModule):
    """Swin Transformer for GreenMIM pre-training and for everything after it.

    One set of weights, two uses:

    - ``backbone(images)`` is the dense Swin: a tuple of maps, for any height and width.
    - ``backbone(images, mask)`` runs on the visible tokens alone: patches of hidden mask units
      are never embedded, and attention packs the unequal windows into groups (GreenMIM,
      Huang et al., NeurIPS 2022). The result is what the dense Swin computes when no token may
      attend to a hidden one.

    Parameter names are those of ``mmdet.SwinTransformer`` and ``mmpretrain.SwinTransformer``:
    checkpoints load by name in both directions. A bias table of another window size is resized
    bicubically while loading.

    Args:
        arch: 'tiny', 'small', 'base', 'large', or a dict with ``embed_dims`` (int), ``depths``
            and ``num_heads`` (one int a stage, four stages).
        img_size: Usual image side in pixels, or ``(height, width)``. The network takes any
            size; this one is only checked.
        in_channels: Channels of the image.
        window_size: Side of the attention windows in tokens, or one per stage.
        mlp_ratio: Width of the MLP over the stage's channels.
        qkv_bias: Whether queries, keys and values have a bias.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0.
        out_indices: Stages whose normalised maps ``backbone(images)`` returns. The masked use
            needs the last stage (3) among them. In distributed pre-training leave the others
            out: their norms would get no gradient.
        pad_small_map: What a stage does whose map is no larger than a window. False (as in
            Swin and mmpretrain): the window shrinks to the map and does not shift. True (as in
            mmdet): the map is padded to the window. Set it in a detector if the result must
            equal ``mmdet.SwinTransformer`` on small maps, too.
        frozen_stages: Stages to freeze: -1 none, 0 the embedding and stage 0, and so on, as in
            ``mmpretrain.SwinTransformer``.
        norm_eval: Whether BatchNorm layers stay in eval mode. Swin has none; kept so that
            configs of other backbones can be taken over.
        with_cp: What is computed again in the backward pass to save memory: False, nothing large;
            'mlp', the hidden channels of the MLPs (about a third less memory for a ninth more
            arithmetic); True, whole blocks.
        norm_cfg: ``dict(type='LN', eps=...)``.
        init_cfg: mmengine's initialisation. ``dict(type='Pretrained', checkpoint=...)`` takes
            any checkpoint with Swin weights under these names, with or without a ``backbone.``
            prefix, and refuses one that fits only in part.

    Raises:
        ValueError: For an argument that makes no sense; the message names it.

    Example:
        >>> backbone = GreenSwin('tiny', window_size=7)
        >>> images = torch.rand(2, 3, 224, 224)
        >>> backbone(images)[0].shape
        torch.Size([2, 768, 7, 7])
        >>> mask = torch.rand(49) < 0.75
        >>> backbone(images, mask).shape == (2, int((~mask).sum()), 768)
        True
    """

    num_extra_tokens = 0

    def __init__(
        self,
        arch: str | dict = 'tiny',
        img_size: int | Sequence[int] = 224,
        in_channels: int = 3,
        window_size: int | Sequence[int] = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.1,
        out_indices: Sequence[int] = (3,),
        pad_small_map: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool | str = False,
        norm_cfg: dict | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        if init_cfg is None:
            init_cfg = [
                dict(type='TruncNormal', layer=['Linear'], std=0.02, bias=0.0),
                dict(type='Constant', layer=['LayerNorm'], val=1.0, bias=0.0),
            ]
        super().__init__(init_cfg)
        self.embed_dims, self.depths, self.num_heads = _check_arch(arch)
        num_stages = len(self.depths)
        self.window_sizes = _check_window_size(window_size, num_stages)
        self.img_size = _check_img_size(img_size)
        norm_eps = _norm_eps(norm_cfg)
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate={drop_path_rate} must lie in [0, 1)')
        if with_cp not in (False, True, 'mlp'):
            raise ValueError(f"with_cp={with_cp!r} must be False, True or 'mlp'")
        for name, value in (('out_indices', out_indices), ('frozen_stages', (frozen_stages,))):
            low = -1 if name == 'frozen_stages' else 0
            if not value or any(not low <= index < num_stages for index in value):
                raise ValueError(f'{name}={value} must name stages from {low} to {num_stages - 1}')
        self.out_indices = tuple(sorted(set(out_indices)))
        self.pad_small_map = pad_small_map
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.num_features = [self.embed_dims << stage for stage in range(num_stages)]

        self.patch_embed = PatchEmbed(in_channels, self.embed_dims, PATCH_SIZE, norm_eps)
        drop_path = torch.linspace(0, drop_path_rate, sum(self.depths), device='cpu').tolist()
        self.stages = nn.ModuleList()
        for stage, (width, depth, heads) in enumerate(
            zip(self.num_features, self.depths, self.num_heads, strict=True)
        ):
            blocks = [
                SwinBlock(
                    width,
                    heads,
                    self.window_sizes[stage],
                    mlp_ratio,
                    qkv_bias,
                    drop_path.pop(0),
                    norm_eps,
                    with_cp,
                )
                for _ in range(depth)
            ]
            last = stage == num_stages - 1
            self.stages.append(SwinStage(blocks, None if last else PatchMerging(width, norm_eps)))
        for stage in self.out_indices:
            self.add_module(f'norm{stage}', nn.LayerNorm(self.num_features[stage], norm_eps))
        self._register_load_state_dict_pre_hook(self._fit_window_size)
        self._freeze_stages()

    def init_weights(self) -> None:
        """Initialise from scratch, or from the checkpoint that ``init_cfg`` names."""
        if isinstance(self.init_cfg, dict) and self.init_cfg.get('type') == 'Pretrained':
            logger = MMLogger.get_current_instance()
            report = load_backbone_state_dict(
                self, self.init_cfg['checkpoint'], self.init_cfg.get('prefix')
            )
            logger.info(f'GreenSwin: {report}')
            self._is_init = True
            return
        super().init_weights()
        for name, parameter in self.named_parameters():
            if name.endswith('relative_position_bias_table'):
                trunc_normal_(parameter, std=0.02)

    def forward(
        self, x: Tensor, mask: Tensor | np.ndarray | None = None
    ) -> tuple[Tensor, ...] | Tensor:
        """Dense maps, or features of the visible mask units.

        Args:
            x: Images ``(B, in_channels, H, W)``. With a mask, sides divisible by 32.
            mask: None, or bool with True = masked, one entry for each unit of 32x32 pixels in
                row-major order: ``(L,)``, ``(1, L)`` or ``(B, L)`` with equal rows. Best on the
                CPU, where the groups are planned.

        Returns:
            Without a mask a tuple of maps ``(B, C_i, H_i, W_i)``, one for each of
            ``out_indices``. With a mask ``(B, num_visible, C)``: the visible units in row-major
            order after the last norm.

        Raises:
            ValueError: If ``x`` or ``mask`` has a shape that does not fit, or nothing is visible.
            TypeError: If ``mask`` is not boolean.
        """
        if x.ndim != 4 or x.shape[1] != self.patch_embed.projection.in_channels:
            raise ValueError(
                f'images have shape {tuple(x.shape)}; GreenSwin takes (B, '
                f'{self.patch_embed.projection.in_channels}, H, W)'
            )
        return self._forward_dense(x) if mask is None else self._forward_visible(x, mask)

    def _forward_dense(self, images: Tensor) -> tuple[Tensor, ...]:
        x, grid = self.patch_embed(images)
        outs = []
        for index, stage in enumerate(self.stages):
            window_size = self.window_sizes[index]
            plans = _dense_plans(grid, window_size, self.pad_small_map, x.device)
            x = stage(x, plans)
            if index in self.out_indices:
                out = getattr(self, f'norm{index}')(x)
                outs.append(out.transpose(1, 2).unflatten(2, grid).contiguous())
            if stage.downsample is not None:
                cells, grid = merge_cells(x, grid)
                x = stage.downsample(cells)
        return tuple(outs)

    def _forward_visible(self, images: Tensor, mask: Tensor | np.ndarray) -> Tensor:
        last = len(self.stages) - 1
        if last not in self.out_indices:
            raise ValueError(
                f'out_indices={self.out_indices}: the masked use normalises the last stage; put '
                f'{last} into out_indices'
            )
        patches, plans = self._visible_input(images, mask)
        x = self.patch_embed.forward_patches(patches)
        for stage, stage_plans in zip(self.stages, plans, strict=True):
            x = stage(x, stage_plans)
            if stage.downsample is not None:
                x = stage.downsample(x.reshape(len(x), -1, 4 * x.shape[2]))
        return getattr(self, f'norm{last}')(x)

    # Planning is numpy on the CPU: torch.compile takes what follows it.
    @torch.compiler.disable
    def _visible_input(
        self, images: Tensor, mask: Tensor | np.ndarray
    ) -> tuple[Tensor, tuple[Plans, ...]]:
        grid = unit_grid(*images.shape[-2:])
        mask = as_unit_mask(mask, grid, len(images))
        plans = self.plan(mask, grid, images.device)
        return visible_patches(images, mask, PATCH_SIZE), plans

    def plan(
        self, mask: np.ndarray, grid: tuple[int, int], device: torch.device
    ) -> tuple[Plans, ...]:
        """Group plans of one step: plain and shifted windows of every stage.

        Args:
            mask: ``(L,)`` bool, True = masked.
            grid: Mask units ``(rows, columns)``.
            device: Where the backbone runs.
        """
        plans = []
        stages = visible_tokens(mask, grid, PATCH_SIZE, len(self.depths))
        for tokens, window_size in zip(stages, self.window_sizes, strict=True):
            cuts = [
                window_grid(tokens.grid, window_size, shifted, self.pad_small_map)
                for shifted in (False, True)
            ]
            built = {
                cut: AttentionPlan.build(grouped_plan(tokens, cut), window_size, device)
                for cut in dict.fromkeys(cuts)
            }
            plans.append((built[cuts[0]], built[cuts[1]]))
        return tuple(plans)

    def train(self, mode: bool = True) -> 'GreenSwin':
        """Set the mode; frozen stages stay in eval mode."""
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def _freeze_stages(self) -> None:
        if self.frozen_stages < 0:
            return
        frozen = [self.patch_embed, *self.stages[: self.frozen_stages + 1]]
        frozen += [
            getattr(self, f'norm{index}')
            for index in self.out_indices
            if index <= self.frozen_stages
        ]
        for module in frozen:
            module.eval()
            module.requires_grad_(False)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter for layer-wise learning-rate decay, as mmpretrain counts it.

        Args:
            param_name: Name of the parameter.
            prefix: Prefix that the name of a backbone parameter has.

        Returns:
            The depth (0 for the embedding, ``num_layers - 1`` for what follows the blocks) and
            ``num_layers``.
        """
        num_layers = sum(self.depths) + 2
        parts = param_name.removeprefix(prefix).split('.')
        if not param_name.startswith(prefix) or parts[0] not in ('patch_embed', 'stages'):
            return num_layers - 1, num_layers
        if parts[0] == 'patch_embed':
            return 0, num_layers
        stage = int(parts[1])
        if parts[2] == 'downsample':
            return sum(self.depths[: stage + 1]), num_layers
        return sum(self.depths[:stage]) + int(parts[3]) + 1, num_layers

    def _fit_window_size(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Resize bias tables of another window size before they are loaded."""
        own = self.state_dict(keep_vars=True)
        for name, parameter in own.items():
            key = prefix + name
            if not name.endswith('relative_position_bias_table') or key not in state_dict:
                continue
            table = state_dict[key]
            same_heads = table.ndim == 2 and table.shape[1] == parameter.shape[1]
            if same_heads and table.shape != parameter.shape:
                state_dict[key] = resize_bias_table(table, parameter.shape[0])
                index = name.removesuffix('bias_table') + 'index'
                state_dict[prefix + index] = own[index]


@torch.compiler.disable
@lru_cache(maxsize=128)
def _dense_plans(
    grid: tuple[int, int], window_size: int, pad_small_map: bool, device: torch.device
) -> Plans:
    """Plans for a dense map: they depend on its size alone, so they are kept."""
    cuts = [window_grid(grid, window_size, shifted, pad_small_map) for shifted in (False, True)]
    # A plan made in inference mode could not serve a later training step.
    with torch.inference_mode(False):
        built = {
            cut: AttentionPlan.build(dense_plan(cut), window_size, device)
            for cut in dict.fromkeys(cuts)
        }
    return built[cuts[0]], built[cuts[1]]


def _check_arch(arch: str | dict) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    if isinstance(arch, str):
        if arch.lower() not in ARCHS:
            raise ValueError(f'arch={arch!r} is unknown; use one of {list(ARCHS)} or a dict')
        arch = ARCHS[arch.lower()]
    keys = ('embed_dims', 'depths', 'num_heads')
    if not isinstance(arch, dict) or set(arch) != set(keys):
        raise ValueError(f'arch={arch!r} must be one of {list(ARCHS)} or a dict with keys {keys}')
    embed_dims, depths, num_heads = arch['embed_dims'], tuple(arch['depths']), arch['num_heads']
    num_heads = tuple(num_heads)
    if not len(depths) == len(num_heads) == 4 or min(*depths, *num_heads, embed_dims) < 1:
        raise ValueError(
            f'arch={arch!r}: depths and num_heads need four positive integers each, embed_dims one'
        )
    for stage, heads in enumerate(num_heads):
        if (embed_dims << stage) % heads:
            raise ValueError(
                f'arch={arch!r}: the {embed_dims << stage} channels of stage {stage} cannot be '
                f'split into {heads} heads'
            )
    return embed_dims, depths, num_heads


def _check_window_size(window_size: int | Sequence[int], num_stages: int) -> tuple[int, ...]:
    single = not isinstance(window_size, Sequence)
    sizes = (window_size,) * num_stages if single else tuple(window_size)
    if len(sizes) != num_stages or any(not isinstance(s, int) or s < 1 for s in sizes):
        raise ValueError(
            f'window_size={window_size} must be a positive integer or {num_stages} of them, one '
            'per stage'
        )
    return sizes


def _check_img_size(img_size: int | Sequence[int]) -> tuple[int, int]:
    single = not isinstance(img_size, Sequence)
    size = (img_size, img_size) if single else tuple(img_size)
    if len(size) != 2 or any(not isinstance(s, int) or s < 1 for s in size):
        raise ValueError(f'img_size={img_size} must be a positive integer or (height, width)')
    return size


def _norm_eps(norm_cfg: dict | None) -> float:
    norm_cfg = dict(norm_cfg or {'type': 'LN'})
    if norm_cfg.pop('type', None) != 'LN' or set(norm_cfg) - {'eps', 'requires_grad'}:
        raise ValueError(f"norm_cfg={norm_cfg} is not supported; use dict(type='LN', eps=1e-5)")
    return norm_cfg.get('eps', 1e-5)
