"""The folder of a run: what lies where, whether it may be used, what it remembers."""

import hashlib
import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ...fileio import atomic_path
from ...version import __version__
from ..errors import UserError
from .plan import Plan, Request, bad_limit, find_model

# What a run writes; --overwrite removes nothing else.
_OWN = (
    *('config.py', 'run.json', 'train.log', 'metrics.jsonl', 'bad_images.txt', 'init.pth'),
    *('last_checkpoint', 'checkpoints', 'pictures', 'exported', 'tensorboard', 'vis_data'),
)
# May differ when a run goes on: they change neither the images of a step nor their order.
# (Whether the images are the same is told by their hash.)
_FREE = ('data', 'devices', 'accumulate', 'workers', 'max_bad', 'export', 'tensorboard')
_PACKAGES = {
    'torch': ('torch',),
    'torchvision': ('torchvision',),
    'mmengine': ('onedl-mmengine', 'mmengine'),
    'mmcv': ('onedl-mmcv', 'mmcv'),
    'mmpretrain': ('onedl-mmpretrain', 'mmpretrain'),
    'numpy': ('numpy',),
    'pillow': ('pillow',),
}


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run's files."""

    root: Path

    @property
    def config(self) -> Path:
        """The config, which tools/train.py runs as well."""
        return self.root / 'config.py'

    @property
    def record(self) -> Path:
        """What was done with what."""
        return self.root / 'run.json'

    @property
    def log(self) -> Path:
        """All that libraries say."""
        return self.root / 'train.log'

    @property
    def metrics(self) -> Path:
        """Losses, speeds and times, a JSON object a line."""
        return self.root / 'metrics.jsonl'

    @property
    def bad_images(self) -> Path:
        """Images that were passed over."""
        return self.root / 'bad_images.txt'

    @property
    def init(self) -> Path:
        """The weights that the run started from, in this package's names."""
        return self.root / 'init.pth'

    @property
    def pictures(self) -> Path:
        """Painted images, and the curve of the loss."""
        return self.root / 'pictures'

    @property
    def exported(self) -> Path:
        """The results."""
        return self.root / 'exported'

    def read(self) -> dict[str, Any]:
        """The record.

        Raises:
            UserError: If there is none, or it is damaged.
        """
        try:
            record = json.loads(self.record.read_text(encoding='utf-8'))
            Plan.from_dict(record['settings'])
            return record
        except FileNotFoundError:
            raise UserError(
                f'--resume: {self.root} holds no run (no {self.record.name}); start one without '
                '--resume'
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'--resume: {self.record} is damaged ({type(error).__name__}: {error}); start anew '
                'with --overwrite'
            ) from error

    def write(self, record: dict[str, Any]) -> None:
        """Replace the record, at once."""
        with atomic_path(self.record, force=True) as temporary:
            temporary.write_text(json.dumps(record, indent=2) + '\n', encoding='utf-8')

    def clear(self) -> None:
        """Remove what an earlier run has left."""
        for name in _OWN:
            path = self.root / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def check_folder(root: Path, resume: bool, overwrite: bool, data: Sequence[str]) -> None:
    """Check that a run may use a folder, and make it.

    Raises:
        UserError: If it holds other things, lies among the images, or cannot be written.
    """
    if resume and overwrite:
        raise UserError('--resume goes on and --overwrite starts anew: give one of them')
    if os.path.lexists(root) and not root.is_dir():
        raise UserError(f'--out {root} is a file; name a folder')
    for source in data:
        folder = Path(os.path.expanduser(source))
        if folder.is_dir() and root.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f'--out {root} lies inside the data {source}, which its pictures would become a '
                'part of; name a folder apart from it'
            )
    if not resume and not overwrite and root.is_dir():
        if first := min((entry.name for entry in os.scandir(root)), default=None):
            raise UserError(
                f'--out {root} is not empty (e.g. {first}): go on with --resume, start anew with '
                '--overwrite, or name another folder'
            )
    if resume:
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'--out {root} cannot be made: {error.strerror}') from error
    if not os.access(root, os.W_OK | os.X_OK):
        raise UserError(f'--out {root}: no permission to write there')


def check_room(root: Path, num_parameters: int) -> None:
    """Raise :class:`UserError` if the disk has no room for checkpoints and results.

    Args:
        root: Folder of the run.
        num_parameters: Of the model.
    """
    # Four checkpoints, while one is written, of numbers and AdamW's two averages; five exports.
    needed = 4 * num_parameters * (3 * 4 + 5)
    free = shutil.disk_usage(root).free
    if free < needed:
        raise UserError(
            f'--out {root} needs {needed / 1e9:.1f} GB for checkpoints and exports, and its disk '
            f'has {free / 1e9:.1f} GB left; make room or choose another disk'
        )


def hash_of(paths: Sequence[str]) -> str:
    """SHA-256 over names and sizes of files, in their order; contents are not read.

    Names count from the folder that holds all of them: it may be moved.
    """
    digest = hashlib.sha256()
    start = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    for path in paths:
        try:
            size = os.stat(path).st_size
        except OSError:
            size = -1
        name = os.path.relpath(path, start)
        digest.update(f'{name}\0{size}\n'.encode(errors='surrogateescape'))
    return digest.hexdigest()


def make_record(plan: Plan, data_hash: str, command: Sequence[str]) -> dict[str, Any]:
    """What ``run.json`` holds when a run starts."""
    return dict(
        greenmim_mm=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        versions={name: _version(names) for name, names in _PACKAGES.items()},
        command=shlex.join(command),
        started=time.strftime('%Y-%m-%dT%H:%M:%S%z'),
        data=dict(images=plan.num_images, sha256_of_names_and_sizes=data_hash),
        settings=plan.to_dict(),
        resumed=[],
    )


def resumed_record(record: dict[str, Any], plan: Plan, command: Sequence[str]) -> dict[str, Any]:
    """The same when it goes on."""
    again = dict(command=shlex.join(command), started=time.strftime('%Y-%m-%dT%H:%M:%S%z'))
    return record | dict(settings=plan.to_dict(), resumed=[*record['resumed'], again])


def resumed_request(request: Request, given: Iterable[str], before: Plan) -> Request:
    """The request of a run that goes on: settings that were not given are those of before.

    Args:
        request: What the user asks for now.
        given: Names of the settings that were named.
        before: The run.

    Raises:
        UserError: If settings that the result depends on are others; the message names them.
    """
    given = set(given)
    old = asdict(before)
    windows = set(before.windows)
    old['window'] = max(windows) if len(windows) > 1 else windows.pop()
    if request.data:
        given.add('data')
    changed, values = [], {}
    for field in fields(Request):
        name = field.name
        if name == 'out':
            continue
        now = getattr(request, name)
        if name == 'max_bad':
            values[name] = now if name in given else str(before.max_bad)
            continue
        if name not in given:
            values[name] = old[name]
            continue
        if name == 'model' and now is not None:
            now = find_model(now)
        if name == 'precision' and now == 'auto':
            now = old[name]
        # A setting that is to be chosen is what was chosen.
        now = old[name] if now is None else now
        if name not in _FREE and now != old[name]:
            changed.append(f'{name.replace("_", "-")} {_text(old[name])} -> {_text(now)}')
        values[name] = now
    if changed:
        raise UserError(
            f'--resume goes on as before, and these settings are others: {", ".join(changed)}; '
            'leave them out, or start anew from the weights in another folder with --init '
            f'{request.out}/exported/timm.safetensors'
        )
    bad_limit(values['max_bad'])
    return Request(out=request.out, **values)


def _text(value: Any) -> str:
    return ' '.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _version(names: Sequence[str]) -> str | None:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def this_command() -> list[str]:
    """The command line that this program was started with."""
    return ['greenmim' if sys.argv[0].endswith('__main__.py') else sys.argv[0], *sys.argv[1:]]
