"""Runs commands one after another, once: what is done is passed over, what stopped goes on."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# What is worth showing of a tool's output; all of it goes to the step's log.
_SHOWN = re.compile(r'(Epoch\((?:train|val|test)\).*)|((?:wrote|kept|dropped|demo data).*)')


class StepError(RuntimeError):
    """A step failed; the message says which one and where its log lies."""


@dataclass(frozen=True)
class Step:
    """One command.

    Args:
        name: Name, and folder of the results under the folder of all.
        title: What the step does, for people.
        command: A tool and its arguments as one would type them in the root of the repository.
        results: Files that the step must leave, relative to its folder.
        inputs: Names of steps whose results it reads.
        files: Files of the repository that it reads.
        resumes: Whether the command can go on where it was interrupted (``--resume``).
    """

    name: str
    title: str
    command: str
    results: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    resumes: bool = False


@dataclass
class Outcome:
    """What a step took.

    Attributes:
        seconds: Time of the run, over all calls if it was resumed.
        fresh: Whether it ran in this call.
    """

    seconds: float
    fresh: bool = True


def run_steps(
    road: Sequence[Step], folder: Path, say: Callable[[str], None], root: Path
) -> dict[str, Outcome]:
    """Do what is not yet done.

    A finished step leaves a marker beside its results. A second call passes over it, an
    interrupted training resumes, and a step whose command or input has changed is done anew.

    Args:
        road: The steps; each comes after those that it reads.
        folder: Where the results of all steps go, a folder each.
        say: Takes lines of progress.
        root: Where the commands run.

    Returns:
        What each step took.

    Raises:
        StepError: If a step fails.
    """
    outcomes: dict[str, Outcome] = {}
    digests: dict[str, str] = {}
    for number, step in enumerate(road, 1):
        notes = _Notes(folder / 'steps', step.name)
        digest = digests[step.name] = _digest(step, digests, root)
        head = f'[{number}/{len(road)}] {step.title}'
        outcomes[step.name] = _do(step, folder / step.name, notes, digest, head, say, root)
    return outcomes


def _do(
    step: Step,
    folder: Path,
    notes: '_Notes',
    digest: str,
    head: str,
    say: Callable[[str], None],
    root: Path,
) -> Outcome:
    marker = notes.read()
    same = marker.get('digest') == digest
    complete = all((folder / name).is_file() for name in step.results)
    if same and marker.get('done') and complete:
        say(f'{head}: already there ({_clock(marker["seconds"])}), in {folder}')
        return Outcome(marker['seconds'], fresh=False)
    spent, resume = 0.0, False
    if same and step.resumes:
        spent, resume = marker.get('seconds', 0.0), (folder / 'last_checkpoint').is_file()
    elif folder.exists():
        shutil.rmtree(folder)
    say(f'{head}{": resumes" * resume}')
    folder.mkdir(parents=True, exist_ok=True)
    seconds = _run(step, notes, digest, resume, spent, say, root)
    missing = [name for name in step.results if not (folder / name).is_file()]
    if missing:
        raise StepError(f'step {step.name} ended without {missing}; see {notes.log}')
    notes.write(digest=digest, seconds=seconds, done=True)
    say(f'    done in {_clock(seconds)}')
    return Outcome(seconds)


def _run(
    step: Step,
    notes: '_Notes',
    digest: str,
    resume: bool,
    spent: float,
    say: Callable[[str], None],
    root: Path,
) -> float:
    """Run the command of a step; returns the seconds that it took, earlier calls included."""
    tool, first, *rest = shlex.split(step.command)
    # Neither before the config nor last: --resume and --cfg-options take what follows them.
    command = [sys.executable, tool, first, *['--resume'] * resume, *rest]
    environment = dict(os.environ, PYTHONUNBUFFERED='1')
    # Threads that spin for each other starve where cores are shared. A shorter spin was as fast
    # as the default on an idle machine; how much it helps on a busy one has not been measured.
    environment.setdefault('GOMP_SPINCOUNT', '20000')
    start = time.monotonic()
    notes.write(digest=digest, seconds=spent, done=False)
    lines: list[str] = []
    with open(notes.log, 'a', encoding='utf-8') as log:
        log.write(f'$ {shlex.join(command)}\n')
        with subprocess.Popen(
            command,
            cwd=root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors='replace',
        ) as process:
            try:
                for line in process.stdout:
                    log.write(line)
                    log.flush()
                    lines = [*lines[-14:], line.rstrip()]
                    if match := _SHOWN.search(line):
                        say(f'    {_shorten(match.group())}')
            except BaseException:  # an interrupt, too, must not leave the tool running
                process.terminate()
                raise
            finally:
                seconds = spent + time.monotonic() - start
                notes.write(digest=digest, seconds=seconds, done=False)
    if process.returncode:
        tail = '\n'.join(f'    | {line}' for line in lines)
        raise StepError(
            f'step {step.name} failed with exit code {process.returncode}; its log is '
            f'{notes.log} and ends with\n{tail}'
        )
    return seconds


def _digest(step: Step, digests: Mapping[str, str], root: Path) -> str:
    """Hash of all that decides about a step's results, but for the code."""
    parts = [step.command, *(digests[name] for name in step.inputs)]
    parts += [hashlib.sha256((root / file).read_bytes()).hexdigest() for file in step.files]
    return hashlib.sha256('\0'.join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class _Notes:
    """What is remembered of a step: its state, and all that its command printed."""

    folder: Path
    name: str

    @property
    def log(self) -> Path:
        return self.folder / f'{self.name}.log'

    def read(self) -> dict:
        try:
            return json.loads((self.folder / f'{self.name}.json').read_text(encoding='utf-8'))
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def write(self, **values) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f'{self.name}.json.tmp'
        temporary.write_text(json.dumps(values), encoding='utf-8')
        temporary.replace(self.folder / f'{self.name}.json')


def _shorten(line: str) -> str:
    """A log line of mmengine without what only debugging needs."""
    line = re.sub(r'(base_lr|data_time|grad_norm|memory|loss_\w+|acc): \S+\s*', '', line)
    return re.sub(r'\s+', ' ', line).strip()


def _clock(seconds: float) -> str:
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d} min'
