"""GreenSwinV2: Swin Transformer V2 that runs on all tokens, or on the visible tokens alone."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..registry import MODELS
from .layers import SwinStage
from .layers_v2 import PatchMergingV2, SwinBlockV2
from .swin_base import SwinBase, find_arch

# Huge and giant are mmpretrain's: Microsoft published neither code nor weights of them.
ARCHS_V2 = {
    'tiny': dict(embed_dims=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    'small': dict(embed_dims=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    'base': dict(embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    'large': dict(embed_dims=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
    'huge': dict(embed_dims=352, depths=(2, 2, 18, 2), num_heads=(8, 16, 32, 64)),
    'giant': dict(embed_dims=512, depths=(2, 2, 42, 4), num_heads=(16, 32, 64, 128)),
}
for _name, _settings in ARCHS_V2.items():
    _settings['extra_norm_every_n_blocks'] = 6 if _name in ('huge', 'giant') else 0

# Buffers that follow from the window size.
_BUFFERS = ('relative_coords_table', 'relative_position_index')


@MODELS.register_module()
class GreenSwinV2(SwinBase):
    """Swin Transformer V2 for GreenMIM pre-training and for everything after it.

    The two uses are those of :class:`~greenmim_mm.models.GreenSwin`: ``backbone(images)`` is the
    dense Swin V2, ``backbone(images, mask)`` runs on the visible tokens alone. Groups of windows
    are the same for both; what attention computes inside them differs: cosine similarity with a
    learned scale, and a position bias from a small network, so that weights serve windows of any
    size (Liu et al., Swin Transformer V2, CVPR 2022).

    Parameter names are those of ``mmpretrain.SwinTransformerV2``: checkpoints load by name in
    both directions. After a change of window size set ``pretrained_window_sizes`` to the windows
    of the pre-training.

    Args:
        arch: 'tiny', 'small', 'base', 'large', 'huge', 'giant', or a dict with ``embed_dims``
            (int), ``depths`` and ``num_heads`` (one int a stage, four stages) and
            ``extra_norm_every_n_blocks`` (int, 0 for none): every n-th block of a stage ends with
            one more LayerNorm.
        img_size: Usual image side in pixels, or ``(height, width)``. The network takes any
            size; this one is only checked.
        in_channels: Channels of the image.
        window_size: Side of the attention windows in tokens, or one per stage. Unless
            ``pad_small_map`` is set, none may be larger than its map: the position network knows
            no shrunk window.
        mlp_ratio: Width of the MLP over the stage's channels.
        qkv_bias: Whether queries and values have a bias.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0. It skips the
            branch with its norm, as in Microsoft's code and timm; mmpretrain drops before the norm.
        out_indices: Stages whose normalised maps ``backbone(images)`` returns. The masked use
            needs the last stage (3) among them. In distributed pre-training leave the others
            out: their norms would get no gradient.
        pad_small_map: What a stage does whose map is no larger than a window. False: an equal
            map is one window, a smaller map is an error. True: the map is padded to the window;
            set it in a detector.
        frozen_stages: Stages to freeze: -1 none, 0 the embedding and stage 0, and so on.
        norm_eval: Whether BatchNorm layers stay in eval mode. Swin has none; kept so that
            configs of other backbones can be taken over.
        with_cp: What is computed again in the backward pass to save memory: False, nothing large;
            'mlp', the branches of the MLPs; True, whole blocks; a number n, every n-th block
            whole.
        sequential_groups: Compute attention over so many groups (or windows, in the dense use) of
            an image at a time, where all at once would not fit into memory. None: all at once.
        pretrained_window_sizes: Windows in pre-training, one per stage; 0 stands for the window
            in use.
        norm_cfg: ``dict(type='LN', eps=...)``.
        init_cfg: mmengine's initialisation. ``dict(type='Pretrained', checkpoint=...)`` takes
            any checkpoint with Swin V2 weights under these names, with or without a ``backbone.``
            prefix, and refuses one that fits only in part.

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

    def __init__(
        self,
        arch: str | dict = 'tiny',
        img_size: int | Sequence[int] = 256,
        in_channels: int = 3,
        window_size: int | Sequence[int] = 8,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.1,
        out_indices: Sequence[int] = (3,),
        pad_small_map: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool | int | str = False,
        sequential_groups: int | None = None,
        pretrained_window_sizes: Sequence[int] = (0, 0, 0, 0),
        norm_cfg: dict | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        arch = find_arch(arch, ARCHS_V2)
        super().__init__(
            arch,
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
        self.pretrained_window_sizes = _check_pretrained(pretrained_window_sizes, self.depths)
        every = _check_extra_norm(arch['extra_norm_every_n_blocks'])
        stages = []
        for stage, settings in enumerate(self._block_settings()):
            blocks = [
                SwinBlockV2(
                    pretrained_window_size=self.pretrained_window_sizes[stage],
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    extra_norm=every > 0 and number % every == 0,
                    **kwargs,
                )
                for number, kwargs in enumerate(settings, start=1)
            ]
            merging = None
            if stage > 0:
                merging = PatchMergingV2(self.num_features[stage - 1], self.norm_eps)
            stages.append(SwinStage(blocks, merging))
        self._add_stages(stages)
        self._register_load_state_dict_pre_hook(self._keep_own_buffers)

    def _merging(self, stage: int) -> PatchMergingV2 | None:
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

    def _keep_own_buffers(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Buffers follow from the window in use; those of a checkpoint are for another one."""
        for name, buffer in self.named_buffers():
            if name.endswith(_BUFFERS) and prefix + name in state_dict:
                state_dict[prefix + name] = buffer


def _check_pretrained(sizes: Sequence[int], depths: Sequence[int]) -> tuple[int, ...]:
    single = not isinstance(sizes, Sequence)
    if single or len(sizes) != len(depths) or any(not isinstance(s, int) or s < 0 for s in sizes):
        raise ValueError(
            f'pretrained_window_sizes={sizes} must be {len(depths)} integers, one per stage; 0 '
            'stands for the window in use'
        )
    return tuple(sizes)


def _check_extra_norm(every: int) -> int:
    if not isinstance(every, int) or every < 0:
        raise ValueError(f'extra_norm_every_n_blocks={every} must be an integer, 0 for none')
    return every
