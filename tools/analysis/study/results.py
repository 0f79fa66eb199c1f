"""Results and state on disk: written whole or not at all, and never mixed between versions."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .design import Cell, Study, StudyError, version

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Places:
    """Where the study keeps what.

    Args:
        results: Small JSON files, one a cell; they belong to the repository.
        state: Data, checkpoints and logs; they do not.
    """

    results: Path = ROOT / 'docs/evidence'
    state: Path = ROOT / 'work_dirs/evidence'

    def folder(self, study: Study, cell: Cell) -> Path:
        """Folder of a cell's checkpoints and logs, by version: another one never sees them.

        A longer pre-training goes on from a shorter one, so both have one folder.
        """
        name = replace(cell, length=1).name if cell.kind == 'pretrain' else cell.name
        return self.state / version(study, cell) / name

    def data(self, study: Study) -> Path:
        """Folder of the study's data."""
        return self.state / f'data_{version(study)}'


def write_atomically(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        temporary.write_text(text, encoding='utf-8')
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_result(places: Places, study: Study, cell: Cell, values: dict[str, Any]) -> Path:
    """Write the result of a cell, with the version that it belongs to."""
    path = places.results / f'{cell.name}.json'
    content = dict(version=version(study, cell), cell=asdict(cell), values=values)
    write_atomically(path, json.dumps(content, indent=1) + '\n')
    return path


def read_result(places: Places, study: Study, cell: Cell) -> dict[str, Any] | None:
    """What a cell gave, or None if it has not been computed.

    Raises:
        StudyError: If the file is of another version of the study, or none of its results.
    """
    path = places.results / f'{cell.name}.json'
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        found, values = content['version'], content['values']
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise StudyError(f'{path} is no result of the study; remove it ({error})') from error
    expected = version(study, cell)
    if found != expected:
        raise StudyError(
            f'{path} is of version {found} of the study, this is {expected}: results of two '
            'versions are not mixed; move it away, or go back to the settings that it was made with'
        )
    return values


class Busy(StudyError):
    """Another process works at the cell."""


@contextmanager
def working_at(folder: Path) -> Iterator[None]:
    """Hold a cell's folder; the hold ends with the process, however that ends.

    Raises:
        Busy: If another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'lock', 'w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Busy(f'another process works at {folder}; wait for it') from None
        yield
