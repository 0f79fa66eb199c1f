"""GreenSwin: Swin Transformer that runs on all tokens, or on the visible tokens alone."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.model.weight_init import trunc_normal_
from torch import Tensor, nn

from ..archs import SWIN_ARCHS
from ..checkpoint import load_backbone_state_dict
from ..ops import (
    PlanCache,
    PlanPair,
    UnitMask,
    as_unit_mask,
    attention_plan,
    dense_plan,
    grouped_plan,
    merge_cells,
    plan_pair,
    recompute_obstacle,
    resize_bias_table,
    unit_grid,
    visible_patches,
    visible_tokens,
)
from ..registry import MODELS
from .arguments import check_types, find_arch, image_sides, window_sides
from .layers import (
    PatchEmbed,
    PatchMerging,
    SwinBlock,
    SwinStage,
    WindowMSA,
    layer_norm,
)

PATCH_SIZE = 4

# Plans of dense maps. Detection at many sizes has hundreds of them, of some megabytes each.
_DENSE_PLANS = PlanCache(max_bytes=128 << 20)


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
            size; where this one leaves parts of a window unused, the log says so.
        in_channels: Channels of the image.
        window_size: Side of the attention windows in tokens, or one per stage.
        mlp_ratio: Width of the MLP over the stage's channels.
        qkv_bias: Whether queries, keys and values have a bias.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0.
        out_indices: Stages whose normalised maps ``backbone(images)`` returns. The masked use
            needs the last stage (3) among them. In distributed pre-training leave the others
            out: their norms would get no gradient.
        pad_small_map: What a stage does whose map is no larger than a window. False (Swin's own
            rule): the window shrinks to the smaller side of the map and does not shift. True (as
            in mmdet): the map is padded to the window. Set it in a detector if the result must
            equal ``mmdet.SwinTransformer`` on small maps, too.
        frozen_stages: Stages to freeze: -1 none, 0 the embedding and stage 0, and so on, as in
            ``mmpretrain.SwinTransformer``.
        norm_eval: Whether BatchNorm layers stay in eval mode. Swin has none; kept so that
            configs of other backbones can be taken over.
        with_cp: What is computed again in the backward pass to save memory: False, nothing large;
            'mlp', the branches of the MLPs (about a third less memory for a ninth more
            arithmetic); True, whole blocks; a number n, every n-th block whole.
        recompute: Whether results of norms and GELU are computed again in the backward pass, which
            takes a third off the memory. False: they are kept, and fewer bytes move; where memory
            is not short, a GPU may then be faster (docs/benchmarks.md has the counts).
        sequential_groups: Compute attention over so many groups (or windows, in the dense use) of
            an image at a time, where all at once would not fit into memory. None: all at once.
        norm_cfg: ``dict(type='LN', eps=..., requires_grad=...)``.
        init_cfg: mmengine's initialisation. ``dict(type='Pretrained', checkpoint=...)`` takes
            any checkpoint with Swin weights under these names, a path or a URL, with or without a
            ``backbone.`` prefix, and refuses one that fits only in part.

    Raises:
        TypeError: For an argument of a wrong type.
        ValueError: For one that makes no sense; both messages name it.

    Example:
        >>> backbone = GreenSwin('tiny', window_size=7)
        >>> images = torch.rand(2, 3, 224, 224)
        >>> backbone(images)[0].shape
        torch.Size([2, 768, 7, 7])
        >>> mask = torch.rand(49) < 0.75
        >>> backbone(images, mask).shape == (2, int((~mask).sum()), 768)
        True
    """

    archs = SWIN_ARCHS
    optional_arch_keys: dict[str, Any] = {}
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
        with_cp: bool | int | str = False,
        recompute: bool = True,
        sequential_groups: int | None = None,
        norm_cfg: dict | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        if init_cfg is None:
            init_cfg = [
                dict(type='TruncNormal', layer=['Linear'], std=0.02, bias=0.0),
                dict(type='Constant', layer=['LayerNorm'], val=1.0, bias=0.0),
            ]
        super().__init__(init_cfg)
        check_types('an integer', in_channels=in_channels, frozen_stages=frozen_stages)
        check_types('a number', mlp_ratio=mlp_ratio, drop_path_rate=drop_path_rate)
        switches = dict(
            qkv_bias=qkv_bias,
            pad_small_map=pad_small_map,
            norm_eval=norm_eval,
            recompute=recompute,
        )
        check_types('True or False', **switches)
        check_types('a list of integers', out_indices=out_indices)
        if sequential_groups is not None:
            check_types('an integer', sequential_groups=sequential_groups)
        self.arch = find_arch(arch, self.archs, self.optional_arch_keys)
        self.embed_dims = self.arch['embed_dims']
        self.depths, self.num_heads = tuple(self.arch['depths']), tuple(self.arch['num_heads'])
        num_stages = len(self.depths)
        self.window_sizes = window_sides(window_size, num_stages)
        self.img_size = image_sides(img_size)
        if in_channels < 1 or not 0 < mlp_ratio < float('inf'):
            raise ValueError(
                f'in_channels={in_channels} and mlp_ratio={mlp_ratio} must be positive'
            )
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate={drop_path_rate} must lie in [0, 1)')
        if with_cp != 'mlp' and (not isinstance(with_cp, int) or with_cp < 0):
            raise ValueError(
                f"with_cp={with_cp!r} must be False, True, 'mlp', or a number n: every n-th block"
            )
        if sequential_groups is not None and sequential_groups < 1:
            raise ValueError(
                f'sequential_groups={sequential_groups} must be positive, or None for all at once'
            )
        if not out_indices or any(not 0 <= index < num_stages for index in out_indices):
            raise ValueError(
                f'out_indices={out_indices} must name stages from 0 to {num_stages - 1}'
            )
        if not -1 <= frozen_stages < num_stages:
            raise ValueError(
                f'frozen_stages={frozen_stages} must be a stage from 0 to {num_stages - 1}, or -1 '
                'for none'
            )
        self.out_indices = tuple(sorted(set(out_indices)))
        self.pad_small_map = pad_small_map
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.num_features = [self.embed_dims << stage for stage in range(num_stages)]

        norm = layer_norm(norm_cfg)
        self.patch_embed = PatchEmbed(in_channels, self.embed_dims, PATCH_SIZE, norm)
        drop_path = torch.linspace(0, drop_path_rate, sum(self.depths), device='cpu').tolist()
        self.stages = nn.ModuleList()
        for stage, depth in enumerate(self.depths):
            first = sum(self.depths[:stage])
            blocks = [
                SwinBlock(
                    self.num_features[stage],
                    self._attention(stage, qkv_bias, sequential_groups),
                    norm,
                    mlp_ratio,
                    drop_path[number],
                    _block_with_cp(with_cp, number),
                    recompute,
                    **self._block_kind(number - first),
                )
                for number in range(first, first + depth)
            ]
            self.stages.append(SwinStage(blocks, self._downsample(stage, norm)))
        for stage in self.out_indices:
            self.add_module(f'norm{stage}', norm(self.num_features[stage]))
        self._freeze_stages()
        self._register_load_state_dict_pre_hook(self._fit_state_dict)
        self._tell_unused_windows()

    # What Swin V2 does otherwise: the attention, the order of a block, where merging lies.

    def _attention(self, stage: int, qkv_bias: bool, sequential_groups: int | None) -> WindowMSA:
        """Attention of a block of ``stage``."""
        return WindowMSA(
            self.num_features[stage],
            self.num_heads[stage],
            self.window_sizes[stage],
            qkv_bias,
            sequential_groups,
        )

    def _block_kind(self, number: int) -> dict[str, bool]:
        """Arguments of :class:`SwinBlock` for block ``number`` of a stage that change its order."""
        return {}

    def _downsample(self, stage: int, norm) -> nn.Module | None:
        """Patch merging that is kept in ``stage``."""
        return (
            PatchMerging(self.num_features[stage], norm) if stage + 1 < len(self.depths) else None
        )

    def _merging(self, stage: int) -> nn.Module | None:
        """Patch merging between a stage and the next, None after the last."""
        return self.stages[stage].downsample

    def _check_map(self, stage: int, grid: tuple[int, int]) -> None:
        """Raise ``ValueError`` if a stage's window does not suit its map."""

    def _init_from_scratch(self) -> None:
        """Initialise what mmengine's ``init_cfg`` does not reach."""
        for block in self.blocks():
            trunc_normal_(block.attn.w_msa.relative_position_bias_table, std=0.02)

    def _fit_state_dict(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
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

    def _tell_unused_windows(self) -> None:
        """Log which rows of bias tables images of ``img_size`` never train."""
        for stage, window_size in enumerate(self.window_sizes):
            side = -(-min(self.img_size) // (PATCH_SIZE << stage))
            if self.pad_small_map or window_size <= side:
                continue
            rows, used = (2 * window_size - 1) ** 2, (2 * side - 1) ** 2
            print_log(
                f'{type(self).__name__}: windows of {window_size} on the map of {side} tokens that '
                f'stage {stage} has at img_size={self.img_size}: {rows - used} of {rows} rows of '
                f'its bias tables are never trained; window_size={side} for this stage has none',
                logger='current',
            )

    def init_weights(self) -> None:
        """Initialise from scratch, or from the checkpoint that ``init_cfg`` names."""
        if isinstance(self.init_cfg, dict) and self.init_cfg.get('type') == 'Pretrained':
            report = load_backbone_state_dict(
                self, self.init_cfg['checkpoint'], self.init_cfg.get('prefix')
            )
            print_log(f'{type(self).__name__}: {report}', logger='current')
            self._is_init = True
            return
        super().init_weights()
        self._init_from_scratch()

    def forward(
        self, x: Tensor, mask: UnitMask | Tensor | np.ndarray | None = None
    ) -> tuple[Tensor, ...] | Tensor:
        """Dense maps, or features of the visible mask units.

        Args:
            x: Images ``(B, in_channels, H, W)``. With a mask, sides divisible by 32.
            mask: None, or bool with True = masked, one entry for each unit of 32x32 pixels in
                row-major order: ``(L,)``, ``(1, L)`` or ``(B, L)`` with equal rows. Best on the
                CPU, where the groups are planned. A
                :class:`~greenmim_mm.ops.UnitMask` is not checked again.

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
                f'images have shape {tuple(x.shape)}; {type(self).__name__} takes (B, '
                f'{self.patch_embed.projection.in_channels}, H, W)'
            )
        return self._forward_dense(x) if mask is None else self._forward_visible(x, mask)

    def _forward_dense(self, images: Tensor) -> tuple[Tensor, ...]:
        x, grid = self.patch_embed(images)
        outs = []
        for index, stage in enumerate(self.stages):
            if torch.jit.is_tracing():  # where sizes are tensors
                grid = tuple(map(int, grid))
            self._check_map(index, grid)
            x = stage(x, self._dense_plans(index, grid, x.device))
            if index in self.out_indices:
                out = getattr(self, f'norm{index}')(x)
                outs.append(out.transpose(1, 2).unflatten(2, grid).contiguous())
            if (merging := self._merging(index)) is not None:
                cells, grid = merge_cells(x, grid)
                x = merging(cells)
        return tuple(outs)

    def _dense_plans(self, stage: int, grid: tuple[int, int], device: torch.device) -> PlanPair:
        """Plans for a dense map: they depend on its size alone, so they are kept."""
        window_size, pad_small_map = self.window_sizes[stage], self.pad_small_map

        def make() -> PlanPair:
            return plan_pair(
                lambda cut: dense_plan(cut, window_size, device), grid, window_size, pad_small_map
            )

        # What is made while something is traced or faked is no plan for anybody else.
        if recompute_obstacle() or torch._C._len_torch_dispatch_stack() or device.type == 'meta':
            return make()
        # A plan made in inference mode could not serve a later training step.
        with torch.inference_mode(False):
            return _DENSE_PLANS.get((grid, window_size, pad_small_map, device), make)

    def _forward_visible(self, images: Tensor, mask: UnitMask | Tensor | np.ndarray) -> Tensor:
        last = len(self.stages) - 1
        if last not in self.out_indices:
            raise ValueError(
                f'out_indices={self.out_indices}: the masked use normalises the last stage; put '
                f'{last} into out_indices'
            )
        patches, plans = self._visible_input(images, mask)
        x = self.patch_embed.forward_patches(patches)
        for index, stage in enumerate(self.stages):
            x = stage(x, plans[index])
            if (merging := self._merging(index)) is not None:
                x = merging(x.reshape(len(x), -1, 4 * x.shape[2]))
        return getattr(self, f'norm{last}')(x)

    # Planning is numpy on the CPU: torch.compile takes what follows it.
    @torch.compiler.disable
    def _visible_input(
        self, images: Tensor, mask: UnitMask | Tensor | np.ndarray
    ) -> tuple[Tensor, tuple[PlanPair, ...]]:
        mask = as_unit_mask(mask, unit_grid(*images.shape[-2:]), len(images))
        plans = self.plan(mask, images.device)
        # A compiler that has been loaded need not learn from one mask after the other what varies.
        if (dynamo := sys.modules.get('torch._dynamo')) is not None:
            for plan in (plan for pair in plans for plan in pair):
                for tensor in (plan.token, plan.window, plan.bias_index, plan.blocked):
                    if tensor is not None:
                        dynamo.maybe_mark_dynamic(tensor, list(range(tensor.ndim)))
        return visible_patches(images, mask, PATCH_SIZE), plans

    def plan(self, mask: UnitMask, device: torch.device) -> tuple[PlanPair, ...]:
        """Group plans of one step: plain and shifted windows of every stage.

        Args:
            mask: The units that are hidden.
            device: Where the backbone runs.
        """
        plans = []
        for index, tokens in enumerate(visible_tokens(mask, PATCH_SIZE, len(self.depths))):
            self._check_map(index, tokens.grid)
            window_size = self.window_sizes[index]
            plans.append(
                plan_pair(
                    lambda cut, tokens=tokens, window_size=window_size: attention_plan(
                        grouped_plan(tokens, cut), window_size, device
                    ),
                    tokens.grid,
                    window_size,
                    self.pad_small_map,
                )
            )
        return tuple(plans)

    def blocks(self) -> Iterator[SwinBlock]:
        """All transformer blocks, from the image to the top."""
        for stage in self.stages:
            yield from stage.blocks

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
            # That of the last block before the merging, wherever its parameters are kept.
            below = stage + 1 if self.stages[stage].downsample is self._merging(stage) else stage
            return sum(self.depths[:below]), num_layers
        return sum(self.depths[:stage]) + int(parts[3]) + 1, num_layers


def _block_with_cp(with_cp: bool | int | str, block: int) -> bool | str:
    """What ``with_cp`` of the network means for block number ``block``."""
    if with_cp == 'mlp' or not with_cp:
        return with_cp or False
    return (block + 1) % with_cp == 0
