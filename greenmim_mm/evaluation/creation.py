"""A backbone by name, by checkpoint, or both."""

from pathlib import Path
from typing import Any

from ..archs import SWIN_ARCHS, SWINV2_ARCHS
from ..checkpoint import inspect_checkpoint
from ..models import GreenSwin, GreenSwinV2
from .frozen import backbone_config, own_checkpoint


def create_model(
    name: str | None = None, checkpoint: str | Path | None = None, **kwargs: Any
) -> GreenSwin:
    """Build a backbone, with the weights of a checkpoint of any known format.

    Args:
        name: 'swin-tiny', 'swin-small', 'swin-base', 'swin-large', or 'swinv2-...'; may be left
            out if there is a checkpoint, which tells.
        checkpoint: File of any format that ``greenmim inspect`` knows, or a folder of transformers.
            Sizes and windows are those in it.
        **kwargs: Arguments of :class:`~greenmim_mm.models.GreenSwin` or
            :class:`~greenmim_mm.models.GreenSwinV2`, e.g. ``out_indices=(0, 1, 2, 3)``, or
            ``window_size``: bias tables are resized.

    Returns:
        The backbone, in training mode as modules are made.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        CheckpointError: If it is damaged or no Swin.
        ValueError: If there is no such model, or the checkpoint holds another one.

    Example:
        >>> create_model('swin-tiny')(torch.rand(1, 3, 224, 224))[0].shape
        torch.Size([1, 768, 7, 7])
    """
    version, size = _parse(name) if name is not None else (None, None)
    if checkpoint is None:
        if name is None:
            raise ValueError('give the name of a model, a checkpoint, or both')
        return (GreenSwin if version == 1 else GreenSwinV2)(size, **kwargs)
    found = inspect_checkpoint(checkpoint).architecture
    if name is not None and (found.version, found.name) != (version, size):
        kind = f'swin{"v2" * (found.version == 2)}-{found.name}'
        holds = kind if found.name else f'a Swin V{found.version} of its own size'
        raise ValueError(f'{checkpoint} holds {holds}, not {name}; leave the name out, or mend it')
    with own_checkpoint(checkpoint) as path:
        settings = backbone_config(path, kwargs.pop('window_size', None)) | kwargs
        kind = {1: GreenSwin, 2: GreenSwinV2}[found.version]
        settings.pop('type')
        settings.setdefault('init_cfg', dict(type='Pretrained', checkpoint=path))
        model = kind(**settings)
        model.init_weights()
    return model


def _parse(name: str) -> tuple[int, str]:
    known = {f'swin-{size}': (1, size) for size in SWIN_ARCHS}
    known |= {f'swinv2-{size}': (2, size) for size in SWINV2_ARCHS}
    if name not in known:
        raise ValueError(f'model {name!r} does not exist; there are {", ".join(known)}')
    return known[name]
