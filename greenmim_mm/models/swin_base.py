"""What GreenSwin and GreenSwinV2 share: both uses of the weights, and the checks."""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from mmengine.logging import MMLogger
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..checkpoint import load_backbone_state_dict
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
from .layers import PatchEmbed, SwinStage

PATCH_SIZE = 4

Plans = tuple[AttentionPlan, AttentionPlan]


class SwinBase(BaseModule):
    """A Swin that runs on all tokens, or on the visible tokens alone.

    A subclass makes the stages, hands them to :meth:`_add_stages` and says where patch merging
    lies. Arguments are those of :class:`~greenmim_mm.models.GreenSwin`; ``arch`` is a dict here.
    """

    num_extra_tokens = 0

    def __init__(
        self,
        arch: dict,
        img_size: int | Sequence[int],
        in_channels: int,
        window_size: int | Sequence[int],
        drop_path_rate: float,
        out_indices: Sequence[int],
        pad_small_map: bool,
        frozen_stages: int,
        norm_eval: bool,
        with_cp: bool | int | str,
        sequential_groups: int | None,
        norm_cfg: dict | None,
        init_cfg: dict | list[dict] | None,
    ) -> None:
        if init_cfg is None:
            init_cfg = [
                dict(type='TruncNormal', layer=['Linear'], std=0.02, bias=0.0),
                dict(type='Constant', layer=['LayerNorm'], val=1.0, bias=0.0),
            ]
        super().__init__(init_cfg)
        _check_arch(arch)
        self.embed_dims = arch['embed_dims']
        self.depths, self.num_heads = tuple(arch['depths']), tuple(arch['num_heads'])
        num_stages = len(self.depths)
        self.window_sizes = _check_window_size(window_size, num_stages)
        self.img_size = _check_img_size(img_size)
        self.norm_eps = _norm_eps(norm_cfg)
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
        for name, value in (('out_indices', out_indices), ('frozen_stages', (frozen_stages,))):
            low = -1 if name == 'frozen_stages' else 0
            if not value or any(not low <= index < num_stages for index in value):
                raise ValueError(f'{name}={value} must name stages from {low} to {num_stages - 1}')
        self.out_indices = tuple(sorted(set(out_indices)))
        self.pad_small_map = pad_small_map
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.num_features = [self.embed_dims << stage for stage in range(num_stages)]

        self.patch_embed = PatchEmbed(in_channels, self.embed_dims, PATCH_SIZE, self.norm_eps)
        self._with_cp, self._drop_path_rate = with_cp, drop_path_rate
        self._sequential_groups = sequential_groups

    def _block_settings(self) -> list[list[dict]]:
        """Arguments that blocks of V1 and V2 share, for each block of each stage."""
        drop_path = torch.linspace(0, self._drop_path_rate, sum(self.depths), device='cpu').tolist()
        settings = []
        for stage, depth in enumerate(self.depths):
            first = sum(self.depths[:stage])
            settings.append(
                [
                    dict(
                        embed_dims=self.num_features[stage],
                        num_heads=self.num_heads[stage],
                        window_size=self.window_sizes[stage],
                        drop_path=drop_path[number],
                        norm_eps=self.norm_eps,
                        with_cp=_block_with_cp(self._with_cp, number),
                        sequential_groups=self._sequential_groups,
                    )
                    for number in range(first, first + depth)
                ]
            )
        return settings

    def _add_stages(self, stages: Sequence[SwinStage]) -> None:
        """Take the stages that a subclass has made, and add what follows from them."""
        self.stages = nn.ModuleList(stages)
        for stage in self.out_indices:
            self.add_module(f'norm{stage}', nn.LayerNorm(self.num_features[stage], self.norm_eps))
        self._freeze_stages()

    def _merging(self, stage: int) -> nn.Module | None:
        """Patch merging between a stage and the next, None after the last."""
        raise NotImplementedError

    def init_weights(self) -> None:
        """Initialise from scratch, or from the checkpoint that ``init_cfg`` names."""
        if isinstance(self.init_cfg, dict) and self.init_cfg.get('type') == 'Pretrained':
            logger = MMLogger.get_current_instance()
            report = load_backbone_state_dict(
                self, self.init_cfg['checkpoint'], self.init_cfg.get('prefix')
            )
            logger.info(f'{type(self).__name__}: {report}')
            self._is_init = True
            return
        super().init_weights()
        self._init_from_scratch()

    def _init_from_scratch(self) -> None:
        """Initialise what mmengine's ``init_cfg`` does not reach."""

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
                f'images have shape {tuple(x.shape)}; {type(self).__name__} takes (B, '
                f'{self.patch_embed.projection.in_channels}, H, W)'
            )
        return self._forward_dense(x) if mask is None else self._forward_visible(x, mask)

    def _forward_dense(self, images: Tensor) -> tuple[Tensor, ...]:
        x, grid = self.patch_embed(images)
        outs = []
        for index, stage in enumerate(self.stages):
            window_size = self.window_sizes[index]
            self._check_map(index, grid)
            plans = _dense_plans(grid, window_size, self.pad_small_map, x.device)
            x = stage(x, plans)
            if index in self.out_indices:
                out = getattr(self, f'norm{index}')(x)
                outs.append(out.transpose(1, 2).unflatten(2, grid).contiguous())
            if (merging := self._merging(index)) is not None:
                cells, grid = merge_cells(x, grid)
                x = merging(cells)
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
        for index, stage in enumerate(self.stages):
            x = stage(x, plans[index])
            if (merging := self._merging(index)) is not None:
                x = merging(x.reshape(len(x), -1, 4 * x.shape[2]))
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
        for index, (tokens, window_size) in enumerate(zip(stages, self.window_sizes, strict=True)):
            self._check_map(index, tokens.grid)
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

    def _check_map(self, stage: int, grid: tuple[int, int]) -> None:
        """Raise ``ValueError`` if a stage's window does not suit its map."""

    def blocks(self) -> Iterator[nn.Module]:
        """All transformer blocks, from the image to the top."""
        for stage in self.stages:
            yield from stage.blocks

    def train(self, mode: bool = True) -> 'SwinBase':
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


def _block_with_cp(with_cp: bool | int | str, block: int) -> bool | str:
    """What ``with_cp`` of the network means for block number ``block``."""
    if with_cp == 'mlp' or not with_cp:
        return with_cp or False
    return (block + 1) % with_cp == 0


def find_arch(arch: str | dict, archs: dict[str, dict]) -> dict:
    """The settings of an architecture by name, or the dict itself if it has the right keys.

    Raises:
        ValueError: If the name is unknown or keys are missing or too many.
    """
    if isinstance(arch, str):
        if arch.lower() not in archs:
            raise ValueError(f'arch={arch!r} is unknown; use one of {list(archs)} or a dict')
        return archs[arch.lower()]
    keys = tuple(next(iter(archs.values())))
    if not isinstance(arch, dict) or set(arch) != set(keys):
        raise ValueError(f'arch={arch!r} must be one of {list(archs)} or a dict with keys {keys}')
    return arch


def _check_arch(arch: dict) -> None:
    embed_dims, depths, num_heads = (arch[key] for key in ('embed_dims', 'depths', 'num_heads'))
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
