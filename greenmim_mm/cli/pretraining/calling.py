"""``greenmim pretrain`` as a function."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..screen import Screen
from .plan import Request
from .running import pretrain as run


def pretrain(
    data: str | Path | Sequence[str | Path] = (),
    out: str | Path = '',
    model: str | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
    cfg_options: Mapping[str, Any] | Sequence[str] = (),
    **settings: Any,
) -> Path | None:
    """Pre-train a Swin on images without labels, and export it for other libraries.

    What ``greenmim pretrain`` does, with the same settings, files and choices.

    Args:
        data: Folders of images, image files, and lists of images (.txt); with ``resume`` it may be
            left out.
        out: Folder of the run.
        model: 'swin-tiny' (the default), ..., 'swinv2-large'.
        resume: Go on with the run in ``out``.
        overwrite: Start anew in a folder that holds a run.
        dry_run: Print what would be done.
        quiet: Print nothing.
        cfg_options: Settings of the config, as ``{'optim_wrapper.optimizer.weight_decay': 0.1}``.
        **settings: ``window``, ``image_size``, ``init``, ``epochs``, ``batch_size``,
            ``accumulate``, ``lr``, ``devices``, ``precision``, ``workers``, ``seed``, ``max_bad``,
            ``export``, ``tensorboard``, ``compile``: see
            :class:`~greenmim_mm.cli.pretraining.plan.Request`. What is not given is chosen.

    Returns:
        The folder with the exported weights; None of a dry run.

    Raises:
        TypeError: If a setting does not exist.
        ValueError: If settings do not go together, or the data cannot be used; the message names
            the option of the command and says what to do.
        CheckpointError: If a checkpoint cannot be written or read.
        Interruption: After SIGTERM or Ctrl-C; all is saved and exported.
        OSError: If a file or folder cannot be read or written.
    """
    known = {field.name for field in fields(Request)}
    if unknown := sorted(settings.keys() - known):
        raise TypeError(
            f'pretrain has no setting {unknown[0]!r}; it has {", ".join(sorted(known))}'
        )
    if not str(out):
        raise UserError('out is missing: name the folder of the run')
    sources = [data] if isinstance(data, (str, Path)) else list(data)
    settings = {name: value for name, value in settings.items() if value is not None}
    if model is not None:
        settings['model'] = model
    if cfg_options:
        if isinstance(cfg_options, Mapping):
            cfg_options = [f'{name}={value}' for name, value in cfg_options.items()]
        settings['cfg_options'] = tuple(cfg_options)
    if 'export' in settings:
        export = settings['export']
        settings['export'] = tuple(export.split(',') if isinstance(export, str) else export)
    if settings.get('devices') == 'auto':
        del settings['devices']
    if 'init' in settings:
        settings['init'] = str(settings['init'])
    if 'max_bad' in settings:
        settings['max_bad'] = str(settings['max_bad'])
    request = Request(tuple(map(str, sources)), str(out), **settings)
    command = ['greenmim_mm.pretrain', *map(str, sys.argv)]
    run(request, settings, command, Screen(quiet=quiet), resume, overwrite, dry_run)
    exported = Path(out, 'exported')
    if dry_run or not request.export:
        return None
    return exported
