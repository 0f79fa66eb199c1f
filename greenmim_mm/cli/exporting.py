"""Weights of a pre-training in the formats of the libraries that use them."""

import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint import (
    Architecture,
    build_line,
    convert_file,
    inspect_checkpoint,
)
from ..engine.checkpoints import last_checkpoint
from ..fileio import atomic_folder
from ..version import __version__
from .errors import UserError
from .pretraining.folder import RunFolder
from .pretraining.plan import EXPORTS, Plan
from .screen import Screen

FILES = {
    'mmdet': 'mmdet.pth',
    'timm': 'timm.safetensors',
    'huggingface': 'huggingface',
    'detectron2': 'detectron2.pth',
}
_README, _CARD = 'README.md', 'MODEL_CARD.md'


@dataclass(frozen=True)
class Exports:
    """What :func:`export` wrote.

    Attributes:
        folder: Where it lies.
        files: File or folder of each format.
        code: Lines of Python that load each.
        left_out: Why a format is not there.
    """

    folder: Path
    files: dict[str, Path]
    code: dict[str, str]
    left_out: dict[str, str]


def export(
    checkpoint: str | Path,
    out: str | Path,
    formats: Sequence[str] = EXPORTS,
    *,
    window_size: int | None = None,
    verify: bool = False,
    force: bool = False,
    say: Callable[[str], None] | None = None,
) -> Exports:
    """Write the backbone of a checkpoint for other libraries, with code that loads it.

    The folder gets ``mmdet.pth``, ``timm.safetensors``, ``huggingface/``, ``detectron2.pth``,
    ``README.md`` with the code, and ``MODEL_CARD.md``; it appears whole or not at all.

    Args:
        checkpoint: File of any known format, or the folder of a run: its last checkpoint.
        out: Folder to write.
        formats: Which of 'mmdet', 'timm', 'huggingface' and 'detectron2'.
        window_size: Windows of the results; None keeps them.
        verify: Load each into its library and compare features.
        force: Replace earlier exports in ``out``.
        say: Takes a line for each file.

    Returns:
        What was written. A format whose library has no such network is left out, with the reason.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        FileExistsError: If ``out`` holds other things, or exports and ``force`` is not given.
        ValueError: If a format is unknown, the checkpoint is damaged or no Swin, or none of the
            formats can be written.
        OSError: If the disk is full or may not be written to.
    """
    for name in formats:
        if name not in FILES:
            raise UserError(f'format {name!r} is unknown; there are {", ".join(FILES)}')
    source, out = find_checkpoint(checkpoint), Path(out)
    found = inspect_checkpoint(source)
    arch = found.architecture
    if window_size is not None:
        arch = arch.with_window(window_size)
    written: dict[str, str] = {}
    left_out: dict[str, str] = {}
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(out, force, _check_replaced) as temporary:
        for name in dict.fromkeys(formats):
            try:
                _convert(source, temporary / FILES[name], name, arch, window_size, verify)
            except ValueError as error:
                left_out[name] = str(error).removeprefix(f'{source}: ')
                continue
            written[name] = _code(name, arch, out / FILES[name], temporary / FILES[name])
            if say:
                say(f'wrote {out / FILES[name]}')
        if not written:
            raise UserError(f'{source} fits none of the formats: {next(iter(left_out.values()))}')
        (temporary / _README).write_text(_readme(found.kind, arch, written, left_out), 'utf-8')
        (temporary / _CARD).write_text(
            _model_card(arch, found.sha256, _training_of(checkpoint)), 'utf-8'
        )
    return Exports(out, {name: out / FILES[name] for name in written}, written, left_out)


def tell(exports: Exports, screen: Screen) -> None:
    """Print the code that loads each export, and why one is missing."""
    for name, code in exports.code.items():
        screen.say(f'\n{name}:')
        for line in code.splitlines():
            screen.say(f'    {line}' if line else '')
    for name, reason in exports.left_out.items():
        screen.say(f'\n{name}: not written: {reason}')


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint: the file, a folder of transformers, or the last one of a run's folder.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = Path(path)
    if path.is_dir() and not (path / 'config.json').is_file():
        last = last_checkpoint(path)
        if last is None:
            raise FileNotFoundError(f'{path} is no folder of a run that has a checkpoint')
        return last
    return path


def _convert(
    source: Path,
    path: Path,
    name: str,
    arch: Architecture,
    window_size: int | None,
    verify: bool,
) -> None:
    check = None
    if verify:
        from ..verification import verify_network

        check = verify_network
    convert_file(source, path, _format(name, arch), window_size=window_size, verify=check)


def _format(name: str, arch: Architecture) -> str:
    # mmdet has no Swin V2 of its own: there it is greenmim_mm's.
    return 'greenmim_mm' if (name, arch.version) == ('mmdet', 2) else name


def _check_replaced(folder: Path) -> None:
    """Only earlier exports may be replaced."""
    own = {*FILES.values(), _README, _CARD}
    if foreign := sorted({entry.name for entry in os.scandir(folder)} - own):
        raise FileExistsError(f'{folder} holds other things, e.g. {foreign[0]}; name a new folder')


def _code(name: str, arch: Architecture, path: Path, written: Path) -> str:
    """Lines of Python that load an export."""
    target = _format(name, arch)
    if name == 'mmdet':
        # A detector takes the maps of all stages.
        all_stages = replace(arch, output_norms=(0, 1, 2, 3))
        line = build_line(all_stages, target, path, {})
        if line.startswith('('):  # mmdet's own has one window for all stages
            line = build_line(all_stages, 'greenmim_mm', path, {})
        return (
            'from mmengine.config import ConfigDict\nfrom mmengine.registry import MODELS\n\n'
            f'# In a config of mmdet: model = dict(backbone=backbone, ...)\nbackbone = {line}\n'
            'model = MODELS.build(ConfigDict(backbone))\nmodel.init_weights()'
        )
    if name == 'huggingface':
        config = _read_config(written)
        line = build_line(arch, target, path, {}, config)
        return f'import transformers\n\nmodel = {line}'
    if name == 'timm':
        return f'import timm\n\nmodel = {build_line(arch, target, path, {})}'
    line = build_line(arch, target, path, {})
    if line.startswith('('):
        return f'# {line[1:-1]}'
    line = re.sub(r', out_indices=\(.*?\)|out_indices=\(.*?\), ', '', line)
    return (
        'from detectron2.checkpoint import DetectionCheckpointer\nimport detectron2.modeling\n\n'
        f'# The bottom-up part of the FPN of a detector, `model`:\nbottom_up = {line}\n'
        f'DetectionCheckpointer(model).load({str(path)!r})'
    )


def _read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / 'config.json').read_text(encoding='utf-8'))


def _describe(arch: Architecture) -> str:
    sizes = f'{arch.embed_dims} channels, depths {", ".join(map(str, arch.depths))}'
    windows = ', '.join(map(str, dict.fromkeys(arch.window_sizes or ()))) or 'not told'
    kind = f'Swin{" V2" * (arch.version == 2)} {arch.name or "of its own size"}'
    return f'{kind} ({sizes}, windows {windows})'


def _training_of(run: str | Path) -> dict[str, str]:
    """How a run was trained, for its card; empty if a checkpoint is of none of the command's."""
    folder = RunFolder(Path(run))
    if not folder.record.is_file():
        return {}
    plan = Plan.from_dict(folder.read()['settings'])
    return {
        'training images': f'{plan.num_images:,}, unlabelled',
        'epochs': f'{plan.epochs} of {plan.steps_per_epoch} steps',
        'images of a step': f'{plan.batch_size}',
        'learning rate': f'{plan.lr:.3g}',
        'image size': f'{plan.image_size} pixels',
        'precision': plan.precision,
        'started from': Path(plan.init).name if plan.init else 'random weights',
    }


def _readme(
    kind: str, arch: Architecture, code: Mapping[str, str], left_out: Mapping[str, str]
) -> str:
    parts = [
        '# Exported weights',
        f'{_describe(arch)}; from: {kind}. All files hold the same network. Images are '
        'normalised with mean 123.675, 116.28, 103.53 and standard deviation 58.395, 57.12, '
        '57.375 (RGB, 0 to 255), as ImageNet usually is.',
    ]
    if arch.version == 1 and arch.window_sizes:
        side = 32 * arch.window_sizes[-1]
        parts.append(
            f'Where a map is no larger than a window (the last one, of images up to {side} pixels) '
            "timm and transformers do not shift the window, as Swin's own code, and mmdet and "
            'detectron2 do: there the features of these two differ by that from the others. On '
            f'larger images, e.g. of {2 * side} pixels, all four are the same.'
        )
    for name, lines in code.items():
        parts += [f'## {name}: `{FILES[name]}`', f'```python\n{lines}\n```']
    for name, reason in left_out.items():
        parts += [f'## {name}', f'Not written: {reason}']
    return '\n\n'.join(parts) + '\n'


def _model_card(arch: Architecture, sha256: str, training: Mapping[str, str]) -> str:
    rows = [
        ('network', _describe(arch)),
        ('method', 'GreenMIM (Huang et al., NeurIPS 2022): masked image modelling'),
        *training.items(),
        ('SHA-256 of the checkpoint', f'`{sha256}`'),
        ('written', f'{time.strftime("%Y-%m-%d")} by greenmim_mm {__version__}'),
    ]
    table = '\n'.join(f'| {name} | {value} |' for name, value in rows)
    return (
        '# Model card\n\n'
        f'| | |\n| --- | --- |\n{table}\n\n'
        '## Use\n\n'
        'A backbone to fine-tune: detection, segmentation, classification. It was trained without '
        'labels to paint hidden parts of images and classifies nothing by itself. How good it is '
        'for a task is told by fine-tuning, or at once by `greenmim knn` with a few labelled '
        'images.\n\n'
        '## Limits\n\n'
        'What it knows is what the images show, with their biases; no figure of quality was '
        'measured by the program that wrote this card. Rights to the weights depend on those to '
        'the images, and on the licence of the weights that training started from, if any.\n'
    )
