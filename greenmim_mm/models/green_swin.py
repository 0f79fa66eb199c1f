"""GreenSwin: Swin Transformer that runs on all tokens, or on the visible tokens alone."""

from collections.abc import Sequence
from typing import Any

from mmengine.model.weight_init import trunc_normal_

from ..ops import resize_bias_table
from ..registry import MODELS
from .layers import PatchMerging, SwinBlock, SwinStage
from .swin_base import SwinBase, find_arch

ARCHS = {
    'tiny': dict(embed_dims=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    'small': dict(embed_dims=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    'base': dict(embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    'large': dict(embed_dims=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
}


@MODELS.register_module()
class GreenSwin(SwinBase):
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
            arithmetic); True, whole blocks; a number n, every n-th block whole.
        sequential_groups: Compute attention over so many groups (or windows, in the dense use) of
            an image at a time, where all at once would not fit into memory. None: all at once.
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
        sequential_groups: int | None = None,
        norm_cfg: dict | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(
            find_arch(arch, ARCHS),
            img_size,
            in_channels,
            window_size,
            drop_path_rate,
            out_indices,
            pad_small_map,
            frozen_stages,
            norm_eval,
            with_cp,
            sequential_groups,
            norm_cfg,
            init_cfg,
        )
        stages = []
        for width, settings in zip(self.num_features, self._block_settings(), strict=True):
            blocks = [
                SwinBlock(mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, **kwargs) for kwargs in settings
            ]
            last = width == self.num_features[-1]
            stages.append(SwinStage(blocks, None if last else PatchMerging(width, self.norm_eps)))
        self._add_stages(stages)
        self._register_load_state_dict_pre_hook(self._fit_window_size)

    def _merging(self, stage: int) -> PatchMerging | None:
        return self.stages[stage].downsample

    def _init_from_scratch(self) -> None:
        for block in self.blocks():
            trunc_normal_(block.attn.w_msa.relative_position_bias_table, std=0.02)

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
