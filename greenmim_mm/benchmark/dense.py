"""GreenSwin in a detector against ``mmdet.SwinTransformer``: same weights, same maps."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..archs import SWIN_ARCHS
from ..models import GreenSwin
from .candidates import missing
from .measure import (
    Result,
    Settings,
    kept_bytes,
    note_out_of_memory,
    record_peak,
    take_turns,
    time_steps,
)


class DensePass:
    """Forward and backward pass of a backbone; every element of its maps has a gradient of one.

    Args:
        model: Backbone that returns maps.
        images: ``(B, 3, H, W)``.
        settings: How to measure.
    """

    def __init__(self, model: nn.Module, images: Tensor, settings: Settings) -> None:
        self.model = model.to(images.device)
        self.model.train()  # mmdet's returns None
        self.images, self.settings = images, settings

    def maps(self) -> tuple[Tensor, ...]:
        """Maps of the stages."""
        with self.settings.autocast():
            return tuple(self.model(self.images))

    def step(self) -> None:
        """One forward and backward pass."""
        maps = self.maps()
        torch.autograd.backward(maps, [torch.ones_like(m) for m in maps])
        self.model.zero_grad()

    def turn(self) -> float:
        """Seconds of one step."""
        return time_steps(self.step, self.settings.steps, self.settings.device)


def run(
    results: list[Result],
    log: Callable[[str], None],
    settings: Settings,
    arch: str = 'tiny',
    size: tuple[int, int] = (800, 1216),
    window: int = 7,
    batch: int = 1,
) -> None:
    """Measure both backbones in turn.

    Args:
        results: Gets an entry for GreenSwin and one for mmdet's Swin.
        log: Takes a line about the progress.
        settings: How to measure.
        arch: Name of the Swin.
        size: Height and width of the images in pixels.
        window: Side of the windows in tokens.
        batch: Images of a step.
    """
    title = f'Swin {arch}, {size[0]}x{size[1]} px, window {window}'
    ours = Result('greenswin', 'GreenSwin', title, batch)
    theirs = Result('mmdet', 'mmdet.SwinTransformer', title, batch)
    theirs.failure = missing(('mmcv', 'mmdet'))
    results += [ours, theirs]

    green = GreenSwin(
        arch,
        window_size=window,
        drop_path_rate=0.0,
        out_indices=(0, 1, 2, 3),
        pad_small_map=True,
    )
    models = [(ours, green)]
    if not theirs.failure:
        from mmdet.models import SwinTransformer

        swin = SwinTransformer(**SWIN_ARCHS[arch], window_size=window, drop_path_rate=0.0)
        swin.load_state_dict(green.state_dict())
        models.append((theirs, swin))

    images = torch.randn(batch, 3, *size, device=settings.device)
    turns, maps = [], []
    for result, model in models:
        log(f'{result.group}: {result.name}: warming up')
        with note_out_of_memory(result):
            with record_peak(result, settings.device):
                dense = DensePass(model, images, settings)
                for _ in range(settings.warmup):
                    dense.step()
            result.kept_bytes = kept_bytes(dense.maps, model)
            with torch.no_grad():
                maps.append(dense.maps())
            turns.append((result, dense.turn))
    if len(maps) == 2:
        apart = max((a - b).abs().max().item() for a, b in zip(*maps, strict=True))
        theirs.note = f'maps differ by at most {apart:.1e}'
    take_turns(turns, settings.repeats, log)
