"""The checkpoints of a work folder: which is the last, and whether it is whole."""

import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from mmengine.logging import print_log

from ..compat import load_mapped

LAST = 'last_checkpoint'
_NAME = re.compile(r'(epoch|iter|interrupted_iter)_(\d+)(\.pth)?')


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or does not fit; the message names it and the remedy."""


def damage(path: str | os.PathLike) -> str:
    """Say what is wrong with a checkpoint; empty if nothing is.

    Each entry of a file that ``torch.save`` writes has a CRC-32, which ``torch.load`` does not
    look at. Of a folder, as strategies that shard write it, all such files are checked.

    Args:
        path: Checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob('*') if file.suffix in ('.pth', '.pt'))
        return next((f'{file.name}: {found}' for file in files if (found := damage(file))), '')
    try:
        with zipfile.ZipFile(path) as archive:
            if entry := archive.testzip():
                return f'checksum of {entry} does not fit'
    # Which byte was hit decides what is raised: a flag, a length, a name.
    except Exception as error:
        return ' '.join(str(error).split()) or type(error).__name__
    return ''


def last_checkpoint(work_dir: str | os.PathLike) -> Path | None:
    """The last whole checkpoint of a run; None if it has none yet.

    Names in ``last_checkpoint`` are looked up beside it first: a folder that was copied or moved
    resumes from itself. A damaged checkpoint is passed over with a warning.

    Args:
        work_dir: Folder of the run.

    Raises:
        CheckpointError: If there are checkpoints and none is whole.
    """
    work_dir = Path(work_dir)
    named = _named(work_dir)
    found = []
    if named is not None:
        if not (reason := damage(named)):
            return named
        found.append(f'{named} ({reason})')
        print_log(f'{named} is damaged ({reason}); the one before it is used', 'current', 30)
    # By what they hold: copying changes dates.
    for _, path in sorted(_others(work_dir, named), reverse=True):
        if not (reason := damage(path)):
            return path
        found.append(f'{path} ({reason})')
        print_log(f'{path} is damaged ({reason})', 'current', 30)
    if found:
        raise CheckpointError(
            f'no checkpoint in {work_dir} is whole: {", ".join(found)}; name another with '
            '--resume PATH, or start anew without --resume'
        )
    return None


def read_meta(path: str | os.PathLike) -> dict:
    """What a checkpoint says about itself; empty if that cannot be read.

    Args:
        path: Checkpoint of mmengine.
    """
    path = Path(path)
    # Strategies that shard write a folder.
    file = path / 'rank0.pth' if path.is_dir() else path
    try:
        # As mmengine reads what it resumes from, but the tensors stay on the disk.
        return dict(load_mapped(file)['meta'])
    # Whatever is in the file decides what is raised.
    except Exception:
        return {}


def _named(work_dir: Path) -> Path | None:
    """What ``last_checkpoint`` names, here or where it says."""
    file = work_dir / LAST
    text = file.read_text().strip() if file.is_file() else ''
    if not text:
        return None
    path = Path(text)
    # Below the work folder, too, where the hook has a folder of its own.
    here = (work_dir / path.name, work_dir / path.parent.name / path.name)
    return next((p for p in (*here, path) if p.exists()), None)


def _others(work_dir: Path, named: Path | None) -> Iterator[tuple[tuple[int, int], Path]]:
    """Checkpoints by iteration; those that cannot be read come last."""
    if not work_dir.is_dir():
        return
    for path in [*work_dir.iterdir(), *work_dir.glob('checkpoints/*')]:
        if path != named and (match := _NAME.fullmatch(path.name)):
            meta = read_meta(path)
            yield (int(meta.get('iter', -1)), int(match[2])), path
