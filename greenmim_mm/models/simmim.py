"""SimMIM over Swin V2: the baseline that computes every token, hidden ones included.

For Swin V1 mmpretrain has it; for V2 nobody has. The algorithm, the decoder and the head are
mmpretrain's.
"""

from collections.abc import Sequence

import torch
from mmengine.model.weight_init import trunc_normal_
from mmpretrain.models import SwinTransformerV2
from torch import Tensor, nn


class SimMIMSwinTransformerV2(SwinTransformerV2):
    """``mmpretrain.SwinTransformerV2`` with mask tokens, for ``mmpretrain.SimMIM``.

    A hidden patch is replaced by a learned token behind the embedding, and the whole image goes
    through the network (Xie et al., SimMIM, CVPR 2022). Arguments are those of the parent; weights
    start as those of :class:`~greenmim_mm.models.GreenSwinV2` do.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.embed_dims))

    def init_weights(self) -> None:
        """Initialise from scratch, or from the checkpoint that ``init_cfg`` names."""
        super().init_weights()
        if isinstance(self.init_cfg, dict) and self.init_cfg.get('type') == 'Pretrained':
            return
        trunc_normal_(self.mask_token, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                of_branch = '.blocks.' in name and name.endswith(('norm1', 'norm2'))
                nn.init.constant_(module.weight, 0.0 if of_branch else 1.0)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, mask: Tensor | None) -> Sequence[Tensor]:
        """Maps of the stages in ``out_indices``.

        Args:
            x: Images ``(B, C, H, W)``.
            mask: None, or ``(B, H / 4, W / 4)``, 1 = hidden, one entry a patch.
        """
        if mask is None:
            return super().forward(x)
        embed = self.patch_embed
        handle = embed.register_forward_hook(lambda *call: self._hide(call[2], mask))
        try:
            return super().forward(x)
        finally:
            handle.remove()

    def _hide(self, embedded: tuple[Tensor, tuple], mask: Tensor) -> tuple[Tensor, tuple]:
        tokens, shape = embedded
        hidden = mask.flatten(1).unsqueeze(-1).to(tokens.dtype)
        return tokens * (1 - hidden) + self.mask_token.to(tokens.dtype) * hidden, shape
