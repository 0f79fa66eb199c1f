"""GreenMIM: masked image modelling that runs a hierarchical backbone on visible tokens alone."""

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.logging import MessageHub
from mmpretrain.models import BaseSelfSupervisor
from mmpretrain.structures import DataSample
from torch import Tensor

from ..ops import (
    UNIT_SIZE,
    UnitMask,
    as_unit_mask,
    check_mask_ratio,
    mask_generator,
    random_mask,
    take_units,
    unit_grid,
)


class GreenMIM(BaseSelfSupervisor):
    """Masked image modelling on visible tokens (Huang et al., NeurIPS 2022).

    A mask of 32x32 pixel units is drawn for each forward pass and process and shared by its
    images. The backbone sees the visible units, the decoder paints all of them, and the loss
    compares the hidden ones with their pixels.

    Args:
        backbone: Backbone with a masked use, e.g. ``greenmim_mm.GreenSwin``.
        neck: Decoder, e.g. ``greenmim_mm.GreenMIMPretrainDecoder``.
        head: ``mmpretrain.MAEPretrainHead`` with ``patch_size=32``.
        mask_ratio: Share of units to hide, in (0, 1).
        mask_seed: Seed of the masks where no runner gives one. Inside a runner its seed counts:
            masks are drawn from (seed, rank, iteration), so a run repeats, also after a resume.
        pretrained: As in mmpretrain.
        data_preprocessor: As in mmpretrain.
        init_cfg: As in mmpretrain.

    Raises:
        ValueError: If ``mask_ratio`` is outside (0, 1), the head's patches are not mask units, or
            the neck is made for another width than the backbone's.
    """

    def __init__(
        self,
        backbone: dict,
        neck: dict,
        head: dict,
        mask_ratio: float = 0.75,
        mask_seed: int = 0,
        pretrained: str | None = None,
        data_preprocessor: dict | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        check_mask_ratio(mask_ratio)
        super().__init__(
            backbone=backbone,
            neck=neck,
            head=head,
            pretrained=pretrained,
            data_preprocessor=data_preprocessor,
            init_cfg=init_cfg,
        )
        if self.head.patch_size != UNIT_SIZE:
            raise ValueError(
                f'head.patch_size={self.head.patch_size} must be the side of a mask unit, '
                f'{UNIT_SIZE} pixels'
            )
        width, wanted = self.backbone.num_features[-1], getattr(self.neck, 'embed_dim', None)
        if wanted not in (None, width):
            raise ValueError(
                f'neck.embed_dim={wanted}, but the last stage of the backbone has {width} '
                f'channels; set embed_dim={width}'
            )
        self.mask_ratio = mask_ratio
        self.mask_seed = mask_seed
        self._last_step: tuple[int, int] | None = None
        self._calls = 0

    # Drawn and planned by numpy on the CPU: torch.compile takes what follows it.
    @torch.compiler.disable
    def draw_mask(self, grid: tuple[int, int]) -> UnitMask:
        """Draw the mask of the next forward pass.

        Args:
            grid: Mask units ``(rows, columns)``.
        """
        hub = MessageHub.get_current_instance()
        seed = hub.get_info('seed') if 'seed' in hub.runtime_info else None
        iteration = hub.get_info('iter') if 'iter' in hub.runtime_info else 0
        step = (self.mask_seed if seed is None else seed, iteration)
        # Without a runner the iteration stands still: the count of calls moves on instead.
        self._calls = self._calls + 1 if step == self._last_step else 0
        self._last_step = step
        rng = mask_generator(step[0], get_rank(), step[1], self._calls)
        return UnitMask(grid, random_mask(grid[0] * grid[1], self.mask_ratio, rng))

    def extract_feat(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Dense features of whole images, ``(B, 3, H, W)`` to a tuple of maps."""
        return self.backbone(inputs)

    def reconstruct(
        self, inputs: Tensor, mask: UnitMask | Tensor | np.ndarray, hidden_only: bool = False
    ) -> Tensor:
        """Paint images of which only the visible units are seen.

        Args:
            inputs: ``(B, 3, H, W)``, sides divisible by 32.
            mask: Bool, True = masked, as :class:`~greenmim_mm.models.GreenSwin` takes it.
            hidden_only: Paint the hidden units alone, as the loss wants it.

        Returns:
            ``(B, L or hidden, 3072)`` prediction for the units, pixels in the order row, column,
            channel; normalised for each unit if the head has ``norm_pix``.
        """
        grid = unit_grid(*inputs.shape[-2:])
        return self.neck(self.backbone(inputs, mask), mask, grid, hidden_only=hidden_only)

    def loss(
        self, inputs: Tensor, data_samples: list[DataSample] | None = None, **kwargs
    ) -> dict[str, Tensor]:
        """Reconstruction loss of a batch.

        Args:
            inputs: ``(B, 3, H, W)`` images, sides divisible by 32.
            data_samples: Not used.

        Returns:
            ``dict(loss=...)``: the head's loss, averaged over the hidden units.
        """
        mask = self.draw_mask(unit_grid(*inputs.shape[-2:]))
        return dict(loss=self.masked_loss(inputs, mask))

    def masked_loss(self, inputs: Tensor, mask: UnitMask | Tensor | np.ndarray) -> Tensor:
        """The loss for a given mask, as :meth:`reconstruct` takes it."""
        mask, target = self._hidden(inputs, mask)
        prediction = self.reconstruct(inputs, mask, hidden_only=True)
        prediction = prediction.reshape(len(target), 1, -1)
        return self.head.loss(prediction, target, prediction.new_ones(len(target), 1))

    @torch.compiler.disable
    def _hidden(
        self, inputs: Tensor, mask: UnitMask | Tensor | np.ndarray
    ) -> tuple[UnitMask, Tensor]:
        """The mask, and the pixels of its hidden units as images of one unit each.

        The head takes square images: of single units, images of any shape will do, and no target
        is made of what can be seen.
        """
        mask = as_unit_mask(mask, unit_grid(*inputs.shape[-2:]), len(inputs))
        return mask, take_units(inputs, mask.hidden_units).flatten(0, 1)
