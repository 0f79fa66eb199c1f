"""The head of SimMIM whose targets are normalised by the pixels around them."""

import torch
import torch.nn.functional as F
from mmpretrain.models import SimMIMHead
from torch import Tensor


class SimMIMNormHead(SimMIMHead):
    """``mmpretrain.SimMIMHead`` with locally normalised targets.

    SimMIM's authors pre-train Swin V2 so (Xie et al., SimMIM, CVPR 2022, and its published
    program): each pixel minus the mean of the square around it, over the deviation there.

    Args:
        patch_size: Side of a token in pixels.
        loss: Loss on pixels, as in the parent.
        norm_size: Side of the square in pixels, odd.

    Raises:
        ValueError: If ``norm_size`` is not odd and positive.
    """

    def __init__(self, patch_size: int, loss: dict, norm_size: int = 47) -> None:
        super().__init__(patch_size, loss)
        if norm_size < 1 or norm_size % 2 == 0:
            raise ValueError(f'norm_size={norm_size} must be odd: each pixel is in the middle')
        self.norm_size = norm_size

    def loss(self, pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Loss over the hidden pixels.

        Args:
            pred: Painted images ``(B, C, H, W)``.
            target: Images ``(B, C, H, W)``.
            mask: ``(B, H / patch_size, W / patch_size)``, 1 = hidden.
        """
        return super().loss(pred, normalise_locally(target, self.norm_size), mask)


def normalise_locally(images: Tensor, size: int) -> Tensor:
    """Each pixel relative to the mean and deviation of the square around it, by channel.

    Squares are cut off at the border of the image. The variance is the unbiased one, plus 1e-6.

    Args:
        images: ``(B, C, H, W)``, floating point.
        size: Side of the square in pixels, odd.

    Returns:
        ``(B, C, H, W)`` of the same dtype.
    """

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, size, stride=1, padding=size // 2, count_include_pad=False)

    # How many pixels of the image a square holds: the same for all images and channels.
    one = torch.ones_like(images[:1, :1])
    count = F.avg_pool2d(one, size, stride=1, padding=size // 2) * size**2
    average = mean(images)
    variance = (mean(images.square()) - average.square()).clamp(min=0)
    variance = variance * count / (count - 1).clamp(min=1)
    return (images - average) / (variance + 1e-6).sqrt()
