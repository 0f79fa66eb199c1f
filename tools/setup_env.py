"""Make ``.venv`` with the pinned stack, mmcv's operators and this package.

Needs nothing but a Python 3.10 to 3.12; ``make setup`` runs it::

    python3.11 tools/setup_env.py [--force]

Steps, each of which is quick when it was done before:

1. make or repair ``.venv``;
2. install torch and torchvision as one pair, then the rest of the pinned stack;
3. install mmcv *with its operators*: from the cache, from a ready-made wheel if there is one, or
   by compiling it, which takes about ten minutes on two cores and happens once per machine;
4. install this package in editable mode and check that ``cv2`` and ``mmcv.ops`` can be imported;
5. write a stamp. While the stamp fits the requirement files, a further run does nothing.

The environment variables ``GREENMIM_MM_CACHE`` (cache folder), ``MAX_JOBS`` (compilers at a time),
``CXX``, ``FORCE_CUDA`` and ``TORCH_CUDA_ARCH_LIST`` are honoured. pip's output is in
``.venv/setup.log`` and the compiler's in ``.venv/mmcv_build.log``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system; two set-ups at a time are then up to the user
    fcntl = None

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / '.venv'
VENV_PYTHON = VENV / 'bin' / 'python'
STAMP = VENV / 'setup.stamp'
SETUP_LOG = VENV / 'setup.log'
BUILD_LOG = VENV / 'mmcv_build.log'

MIN_PYTHON = (3, 10)
MAX_PYTHON = (3, 12)
MMCV = 'onedl-mmcv'
TORCH_PAIR = ('torch', 'torchvision')
# The files of requirements/ that the environment holds, in the order they are installed.
STACK = ('runtime', 'maintained', 'demo', 'tests')
HASHED_FILES = ('setup.py', 'greenmim_mm/version.py')
# Raise it when the steps change so that an environment made by an older script must be redone.
SCRIPT_VERSION = 1

# One compiler of mmcv's sources takes up to about 2 GB.
BYTES_PER_JOB = 2 * 1024**3
REPORT_SECONDS = 15.0
COMPILERS = ('c++', 'g++', 'clang++')

NETWORK_ERRORS = re.compile(
    r'Retrying \(Retry|NewConnectionError|ConnectionError|Connection (?:reset|refused|aborted)|'
    r'ConnectTimeout|ReadTimeout|timed out|Temporary failure in name resolution|IncompleteRead|'
    r'ProtocolError|RemoteDisconnected|HTTP error 5\d\d|5\d\d Server Error|'
    r'DO NOT MATCH THE HASHES',
)


class SetupError(RuntimeError):
    """A failure that the user can act on; its message says how."""


# ---------------------------------------------------------------------------------------------
# Pure parts


def check_python(version: Sequence[int]) -> None:
    """Check that the stack exists for a Python version.

    Args:
        version: Major and minor number first, as in ``sys.version_info``.

    Raises:
        SetupError: If the version is not one of 3.10, 3.11 and 3.12.
    """
    if not MIN_PYTHON <= tuple(version[:2]) <= MAX_PYTHON:
        raise SetupError(
            f'Python {version[0]}.{version[1]} cannot hold this stack: 3.10, 3.11 or 3.12 is '
            'needed. Name one: make setup PYTHON=/path/to/python3.11'
        )


def parse_requirements(text: str) -> list[str]:
    """Return the requirement lines of a requirements file, without comments and options."""
    lines = (line.split('#')[0].strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith('-')]


def requirement_name(requirement: str) -> str:
    """Return the normalised project name of a requirement: ``'Torch>=2.1'`` gives ``'torch'``."""
    return re.sub(r'[-_.]+', '-', re.split(r'[^A-Za-z0-9._-]', requirement)[0]).lower()


def pinned_version(requirements: Sequence[str], name: str) -> str:
    """Return the version that ``requirements`` pin ``name`` to.

    Raises:
        SetupError: If there is no line ``name==version``.
    """
    for requirement in requirements:
        if requirement_name(requirement) == name and '==' in requirement:
            return requirement.split('==')[1].strip()
    raise SetupError(f"requirements/maintained.txt must pin {name} as '{name}==VERSION'")


def cache_key(
    mmcv_version: str, torch_version: str, python_tag: str, platform: str, device: str
) -> str:
    """Return the name of the cache folder that fits exactly one binary interface.

    Args:
        mmcv_version: Such as ``'2.3.6'``.
        torch_version: With its local part, such as ``'2.11.0+cu130'``.
        python_tag: Such as ``'cp311'``.
        platform: As ``sysconfig.get_platform`` gives it, such as ``'linux-x86_64'``.
        device: ``'cpu'``, or as ``choose_device`` gives it, such as ``'cu130-sm90'``.
    """
    parts = (f'{MMCV}-{mmcv_version}', f'torch-{torch_version}', python_tag, platform, device)
    return '_'.join(re.sub(r'[^A-Za-z0-9._+-]+', '-', part) for part in parts)


@dataclasses.dataclass(frozen=True)
class Probe:
    """What the installed torch says about itself and the machine.

    Attributes:
        torch_version: Such as ``'2.11.0+cu130'``.
        cuda_version: The CUDA version torch was built for, ``''`` for a CPU build.
        capabilities: Compute capabilities of the visible GPUs, such as ``['90']``.
        nvcc_version: Version of the CUDA compiler found, ``''`` if there is none.
        python_tag: Such as ``'cp311'``.
        platform: Such as ``'linux-x86_64'``.
        python_header: Where ``Python.h`` must lie.
    """

    torch_version: str
    cuda_version: str
    capabilities: list[str]
    nvcc_version: str
    python_tag: str
    platform: str
    python_header: str


def choose_device(probe: Probe, env: Mapping[str, str]) -> tuple[str, str]:
    """Decide what mmcv's operators are compiled for.

    CUDA operators need a visible GPU and a CUDA compiler of torch's own major version.
    ``FORCE_CUDA=1`` compiles them without a GPU, ``FORCE_CUDA=0`` never does.

    Args:
        probe: Facts about torch and the machine.
        env: The environment variables.

    Returns:
        The device part of the cache key, ``'cpu'`` or such as ``'cu130-sm90'``, and a note for
        the user, ``''`` if there is nothing to say.

    Raises:
        SetupError: If ``FORCE_CUDA=1`` asks for what cannot be compiled.
    """
    force = env.get('FORCE_CUDA', '')
    if force == '0' or (force != '1' and not probe.capabilities):
        return 'cpu', ''
    if not probe.cuda_version:
        obstacle = f'torch {probe.torch_version} is a build without CUDA'
    elif not probe.nvcc_version:
        obstacle = 'there is no CUDA compiler (nvcc; is CUDA_HOME set?)'
    elif probe.nvcc_version.split('.')[0] != probe.cuda_version.split('.')[0]:
        obstacle = f'nvcc is {probe.nvcc_version} while torch is for CUDA {probe.cuda_version}'
    else:
        # The compiled code runs on the named architectures alone, so they are part of the key.
        archs = env.get('TORCH_CUDA_ARCH_LIST') or '-'.join(f'sm{c}' for c in probe.capabilities)
        return f'cu{probe.cuda_version.replace(".", "")}-{archs or "default"}', ''
    if force == '1':
        raise SetupError(f'FORCE_CUDA=1 is set, but {obstacle}')
    return 'cpu', (
        f"mmcv's operators will run on the CPU only: {obstacle}. Training works; to have them on "
        'the GPU, install the CUDA toolkit and run tools/setup_env.py --force'
    )


def max_jobs(cores: int, memory: int | None, env: Mapping[str, str]) -> int:
    """Return how many compilers may run at a time.

    Args:
        cores: Cores that this process may use.
        memory: Bytes of memory to be had, None if unknown.
        env: The environment variables; a ``MAX_JOBS`` in it wins.
    """
    wanted = env.get('MAX_JOBS', '')
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    by_memory = cores if memory is None else memory // BYTES_PER_JOB
    return max(1, min(cores, by_memory))


def describe_activity(line: str) -> str | None:
    """Say in a few words what a line of pip's or ninja's output is about.

    Returns:
        Such as ``'compiled 12 of 78 files'``, or None if the line says nothing of interest.
    """
    match = re.match(r'\s*\[(\d+)/(\d+)\] ', line)
    if match:
        return f'compiled {match[1]} of {match[2]} files'
    match = re.match(r'\s*Downloading (\S+?)(?:\.metadata)? (\([\d.]+ ?[kKMGT]?B\))', line)
    if match:
        return f'downloading {match[1].rsplit("/", 1)[-1]} {match[2]}'
    if re.match(r'\s*Installing collected packages:', line):
        return 'unpacking'
    if re.match(r'\s*g?(?:\w*-)?(?:c\+\+|g\+\+|clang\+\+) .*-shared\b.*_ext', line):
        return 'linking'
    return None


def wheel_has_ops(path: Path) -> bool:
    """Tell whether a file is a whole wheel that holds mmcv's compiled operators."""
    try:
        with zipfile.ZipFile(path) as wheel:
            names = wheel.namelist()
            if not any(re.fullmatch(r'mmcv/_ext[^/]*\.(so|pyd|dylib)', name) for name in names):
                return False
            return wheel.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def stamp_digest(root: Path, python_version: str) -> str:
    """Hash all that decides what the environment holds.

    Args:
        root: The repository. Its place counts as well: the editable install points to it.
        python_version: Full version of the environment's Python.
    """
    digest = hashlib.sha256()
    facts = [SCRIPT_VERSION, str(root), sys.platform, os.uname().machine, python_version]
    digest.update(json.dumps(facts).encode())
    paths = [*sorted((root / 'requirements').glob('*.txt')), *(root / f for f in HASHED_FILES)]
    for path in paths:
        data = path.read_bytes() if path.exists() else b''
        digest.update(f'\0{path.relative_to(root)}\0{len(data)}\0'.encode())
        digest.update(data)
    return digest.hexdigest()


def find_compiler(env: Mapping[str, str], which: Callable[[str], str | None] = shutil.which) -> str:
    """Find the C++ compiler.

    Args:
        env: The environment variables; a ``CXX`` in it wins.
        which: Looks a command up in ``PATH``.

    Raises:
        SetupError: If there is none; the message says how to get one.
    """
    candidates = [env['CXX']] if env.get('CXX') else list(COMPILERS)
    for candidate in candidates:
        # CXX may carry a launcher and flags, as in 'ccache g++'.
        if which(candidate.split()[0]):
            return candidate
    tried = f'CXX={env["CXX"]}' if env.get('CXX') else ', '.join(COMPILERS)
    raise SetupError(
        f"no C++ compiler found (tried {tried}), and mmcv's operators must be compiled once. "
        'Install one and run make setup again:\n'
        '  Debian, Ubuntu: apt-get install g++\n'
        '  Fedora, RHEL:   dnf install gcc-c++\n'
        '  macOS:          xcode-select --install\n'
        "or set CXX to the compiler's path."
    )


def cache_root(env: Mapping[str, str]) -> Path:
    """Return the cache folder: ``GREENMIM_MM_CACHE``, or ``~/.cache/greenmim_mm``."""
    if env.get('GREENMIM_MM_CACHE'):
        return Path(env['GREENMIM_MM_CACHE']).expanduser().resolve()
    return Path.home() / '.cache' / 'greenmim_mm'


def is_network_failure(output: str) -> bool:
    """Tell whether pip's output shows that the network failed, so that trying again may help."""
    return NETWORK_ERRORS.search(output) is not None


def failure_hint(output: str) -> str:
    """Return what to do about a failure of pip, a sentence with a space at its end, or ``''``."""
    if re.search(r'No space left on device|Disk quota exceeded', output):
        return 'The disk is full: the environment takes about 6 GB, the build 1 GB more. '
    if re.search(r'Killed signal terminated|[Cc]annot allocate memory|out of memory', output):
        return 'Memory ran out: set MAX_JOBS=1 and run make setup again. '
    if is_network_failure(output):
        return 'The package index cannot be reached: check the network and proxy settings. '
    return ''


# ---------------------------------------------------------------------------------------------
# Running commands


class Console:
    """Prints one line per finished step and, while a step lasts, what it is doing.

    Args:
        start: ``time.monotonic()`` at the start of the set-up.
    """

    def __init__(self, start: float) -> None:
        self.start = start
        self.tty = sys.stdout.isatty()
        self._shown = 0

    def line(self, text: str) -> None:
        """Print a line, stamped with the seconds since the start."""
        self._print(text, end='\n')
        self._shown = 0

    def status(self, text: str) -> None:
        """Show a passing state: in place on a terminal, as a line elsewhere."""
        if not self.tty:
            self.line(text)
            return
        width = shutil.get_terminal_size().columns - 11
        self._print(text[:width], end='')

    def _print(self, text: str, end: str) -> None:
        line = f'[{time.monotonic() - self.start:5.0f} s] {text}'
        # A shorter line must wipe out what is left of the one it is written over.
        padded = f'\r{line.ljust(self._shown)}' if self.tty else line
        self._shown = len(line)
        print(padded, end=end, flush=True)


def run_command(
    command: Sequence[str | Path],
    label: str,
    log: Path,
    console: Console,
    env: Mapping[str, str] | None = None,
    lock: int | None = None,
) -> tuple[int, str]:
    """Run a command with its output in a log, telling now and then what it is doing.

    Args:
        command: Program and arguments.
        label: What to call it towards the user.
        log: File that the output is appended to.
        console: Where progress goes.
        env: Environment variables, None for the current ones.
        lock: Descriptor of a lock that the command must hold as well, so that it stays locked
            if this script is killed and the command lives on.

    Returns:
        The exit status and the output.
    """
    began = time.monotonic()
    period = 1.0 if console.tty else REPORT_SECONDS
    report_at = began + period
    activity = ''
    with log.open('ab') as sink, log.open('rb') as source:
        sink.write(f'\n$ {" ".join(map(str, command))}\n'.encode())
        sink.flush()
        start = source.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=env,
            start_new_session=True,
            pass_fds=() if lock is None else (lock,),
        )
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.2)
                for line in source.read().decode(errors='replace').splitlines():
                    activity = describe_activity(line) or activity
                if process.returncode is not None:
                    break
                now = time.monotonic()
                if now >= report_at:
                    report_at = now + period
                    doing = f'{activity}, ' if activity else ''
                    # A terminal's line has no room for the log's place.
                    where = '' if console.tty else f', log {os.path.relpath(log, ROOT)}'
                    console.status(f'{label}: {doing}{now - began:.0f} s so far{where}')
        except BaseException:
            # The command has its own session, so an interrupt does not reach it: pass it on.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
        source.seek(start)
        return process.returncode, source.read().decode(errors='replace')


def failure(label: str, output: str, log: Path, hint: str = '') -> SetupError:
    """Make the error for a command that failed, with the end of its output."""
    tail = '\n'.join('  | ' + line[:300] for line in output.strip().splitlines()[-25:])
    return SetupError(f'{label} failed. {hint}The end of {os.path.relpath(log, ROOT)}:\n{tail}')


def run_pip(
    arguments: Sequence[str | Path],
    label: str,
    console: Console,
    log: Path = SETUP_LOG,
    env: Mapping[str, str] | None = None,
    lock: int | None = None,
) -> None:
    """Run pip in the environment; once more if the network fails.

    Raises:
        SetupError: If pip fails.
    """
    command = [VENV_PYTHON, '-m', 'pip', '--disable-pip-version-check', '--no-input']
    command += [arguments[0], '--progress-bar', 'off', *arguments[1:]]
    if arguments[0] == 'install':
        # Python compiles what is imported; doing so for all of torch takes a good part of a minute.
        command.append('--no-compile')
    began = time.monotonic()
    status, output = run_command(command, label, log, console, env, lock)
    if status != 0 and is_network_failure(output):
        console.line(f'{label}: the network failed, trying once more')
        time.sleep(5)
        status, output = run_command(command, label, log, console, env, lock)
    if status != 0:
        raise failure(label, output, log, failure_hint(output))
    console.line(f'{label}: done ({time.monotonic() - began:.1f} s)')


def run_python(code: str, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Run code in the environment's Python; its output also goes to the log."""
    result = subprocess.run(
        # Not in the repository: its folders must not shadow installed packages.
        [str(VENV_PYTHON), '-c', code],
        cwd=VENV,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors='replace',
    )
    with SETUP_LOG.open('a', encoding='utf-8') as log:
        log.write(f'\n$ python -c {code!r}\n{result.stdout}')
    return result.returncode, result.stdout


@contextlib.contextmanager
def locked(path: Path, console: Console, reason: str) -> Iterator[int | None]:
    """Hold an exclusive lock on a file, waiting for whoever holds it; yields its descriptor."""
    if fcntl is None:
        yield None
        return
    with path.open('rb') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            console.line(f'waiting for another process that {reason}')
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


# ---------------------------------------------------------------------------------------------
# Steps


def venv_python_version(venv: Path) -> str | None:
    """Return the Python version of an environment without starting it, None if there is none."""
    try:
        config = (venv / 'pyvenv.cfg').read_text(encoding='utf-8')
    except OSError:
        return None
    match = re.search(r'^version(?:_info)?\s*=\s*(\d+\.\d+\.\d+)', config, re.MULTILINE)
    # exists() follows the link to the base Python, which may have been removed.
    return match[1] if match and (venv / 'bin' / 'python').exists() else None


def is_up_to_date() -> bool:
    """Tell whether the stamp fits the files and the Python."""
    version = venv_python_version(VENV)
    try:
        return version is not None and STAMP.read_text() == stamp_digest(ROOT, version)
    except OSError:
        return False


def ensure_venv(console: Console) -> None:
    """Make ``.venv``, or repair it if it has no working Python or pip.

    Raises:
        SetupError: If it cannot be made, or holds a Python that is too old or too new.
    """
    began = time.monotonic()
    version = venv_python_version(VENV)
    verb = 'kept'
    if version is not None:
        runs = [str(VENV_PYTHON), '-c', 'import sys; print(*sys.version_info[:2])']
        result = subprocess.run(runs, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if result.returncode == 0:
            try:
                check_python([int(part) for part in result.stdout.split()])
            except SetupError as error:
                raise SetupError(f'.venv is unfit, remove it and try again: {error}') from None
            pip = [str(VENV_PYTHON), '-m', 'pip', '--version']
            if subprocess.run(pip, stdin=subprocess.DEVNULL, capture_output=True).returncode:
                pip = [str(VENV_PYTHON), '-m', 'ensurepip', '--upgrade']
                status = subprocess.run(pip, stdin=subprocess.DEVNULL, capture_output=True)
                verb = 'repaired (pip was missing)'
                if status.returncode:
                    version = None
        else:
            version = None
    if version is None:
        verb = 'made'
        if VENV.exists():
            if not (VENV / 'pyvenv.cfg').exists() and any(VENV.iterdir()):
                raise SetupError(
                    f'{VENV} exists but is no virtual environment; move it away and try again'
                )
            console.line('.venv is broken or half-made, making it anew')
        command = [sys.executable, '-m', 'venv', '--clear', str(VENV)]
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if result.returncode:
            name = f'python{sys.version_info[0]}.{sys.version_info[1]}'
            raise SetupError(
                f'{sys.executable} cannot make a virtual environment (on Debian and Ubuntu: '
                f'apt-get install {name}-venv):\n{result.stdout.strip()}'
            )
        version = venv_python_version(VENV)
    console.line(f'{verb}: .venv with Python {version} ({time.monotonic() - began:.1f} s)')


PROBE_CODE = """
import json, re, subprocess, sys, sysconfig
import torch
from torch.utils.cpp_extension import CUDA_HOME
gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
capabilities = sorted({"%d%d" % torch.cuda.get_device_capability(i) for i in gpus})
nvcc = ""
if CUDA_HOME:
    try:
        command = [CUDA_HOME + "/bin/nvcc", "--version"]
        text = subprocess.run(command, capture_output=True, text=True).stdout
        nvcc = "".join(re.findall(r"release (\\d+\\.\\d+)", text)[:1])
    except OSError:
        pass
print("PROBE" + json.dumps({
    "torch_version": torch.__version__,
    "cuda_version": torch.version.cuda or "",
    "capabilities": capabilities,
    "nvcc_version": nvcc,
    "python_tag": "cp%d%d" % sys.version_info[:2],
    "platform": sysconfig.get_platform(),
    "python_header": sysconfig.get_path("include") + "/Python.h",
}))
"""


def probe_machine() -> Probe:
    """Ask the installed torch what mmcv must be compiled for.

    Raises:
        SetupError: If torch cannot be imported.
    """
    status, output = run_python(PROBE_CODE)
    match = re.search(r'^PROBE(\{.*\})$', output, re.MULTILINE)
    if status or not match:
        raise failure('importing torch', output, SETUP_LOG, 'Remove .venv and try again. ')
    return Probe(**json.loads(match[1]))


def usable_memory() -> int | None:
    """Return the bytes of memory to be had: the machine's, or the container's if that is less."""
    found = []
    with contextlib.suppress(OSError):
        match = re.search(r'^MemAvailable:\s+(\d+) kB', Path('/proc/meminfo').read_text(), re.M)
        if match:
            found.append(int(match[1]) * 1024)
    for path in ('/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory/memory.limit_in_bytes'):
        with contextlib.suppress(OSError, ValueError):
            found.append(int(Path(path).read_text()))
    return min(found, default=None)


def usable_cores() -> int:
    """Return the cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cached_wheel(folder: Path, console: Console) -> Path | None:
    """Return the sound wheel in a cache folder, if any, and remove unsound ones."""
    for wheel in sorted(folder.glob('*.whl')):
        if wheel_has_ops(wheel):
            return wheel
        console.line(f'removed the damaged wheel {wheel}')
        wheel.unlink()
    return None


def store_wheel(wheel: Path, folder: Path) -> Path:
    """Put a wheel into a cache folder in one step, so that nobody ever sees half of it."""
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix='.incoming-', dir=folder)
    os.close(handle)
    try:
        shutil.copyfile(wheel, name)
        os.chmod(name, 0o644)
        os.replace(name, folder / wheel.name)
    except BaseException:
        os.unlink(name)
        raise
    return folder / wheel.name


def download_wheel(version: str, folder: Path, console: Console) -> Path | None:
    """Fetch a ready-made wheel that has the operators; None if there is none."""
    began = time.monotonic()
    command = [VENV_PYTHON, '-m', 'pip', '--disable-pip-version-check', '--no-input', 'download']
    command += ['--progress-bar', 'off', '--only-binary=:all:', '--no-deps', '--dest', folder]
    command += [f'{MMCV}=={version}']
    run_command(command, 'looking for a ready-made mmcv', SETUP_LOG, console)
    wheel = next((path for path in folder.glob('*.whl') if wheel_has_ops(path)), None)
    found = 'found' if wheel else 'none'
    console.line(
        f'looked for a ready-made mmcv with operators: {found} ({time.monotonic() - began:.1f} s)'
    )
    return wheel


def unpack_source(version: str, folder: Path, console: Console) -> Path:
    """Fetch mmcv's source into ``folder``, unless it lies there from an interrupted build.

    Raises:
        SetupError: If pip fails or the archive is not of the expected kind.
    """
    source = folder / 'source'
    if source.exists():
        console.line('going on with the mmcv build that was interrupted')
        return source
    archives = folder / 'archives'
    run_pip(
        ['download', '--no-binary=:all:', '--no-build-isolation', '--no-deps']
        + ['--dest', archives, f'{MMCV}=={version}'],
        f'fetching the source of mmcv {version}',
        console,
    )
    archive = next(archives.glob('*.tar.gz'), None)
    if archive is None:
        raise SetupError(f'pip left no .tar.gz of {MMCV} {version} in {archives}')
    unpacked = folder / 'unpacking'
    shutil.rmtree(unpacked, ignore_errors=True)
    with tarfile.open(archive) as tar:
        # Older patch releases of 3.10 and 3.11 have no filters; pip checked the archive's hash.
        tar.extractall(unpacked, **({'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}))
    # Renamed last: a source folder that exists is whole.
    next(unpacked.iterdir()).rename(source)
    return source


def build_wheel(
    version: str, probe: Probe, device: str, folder: Path, console: Console, lock: int | None
) -> Path:
    """Compile mmcv with its operators and keep the wheel in the cache.

    The source lies in the cache while it is compiled, so a build that was interrupted goes on
    with the files that were not compiled yet.

    Args:
        version: mmcv's version.
        probe: Facts about torch and the machine.
        device: ``'cpu'`` or a CUDA device, from ``choose_device``.
        folder: Cache folder of this build.
        console: Where progress goes.
        lock: Descriptor of the lock on ``folder``.

    Raises:
        SetupError: If there is no compiler, the build fails, or the wheel has no operators.
    """
    compiler = find_compiler(os.environ)
    if not Path(probe.python_header).exists():
        raise SetupError(
            f"{probe.python_header} is missing, and mmcv's operators must be compiled once. "
            "Install Python's headers (Debian, Ubuntu: apt-get install python3-dev; Fedora, RHEL: "
            'dnf install python3-devel) and run make setup again.'
        )
    jobs = max_jobs(usable_cores(), usable_memory(), os.environ)
    env = dict(os.environ, MMCV_WITH_OPS='1', MAX_JOBS=str(jobs), CXX=compiler)
    # Python's own flags ask for debug symbols, which slow the build and swell the wheel.
    env['CFLAGS'] = f'{env.get("CFLAGS", "")} -g0'.strip()
    # torch calls ninja by name, and the environment may not be activated.
    env['PATH'] = f'{VENV / "bin"}{os.pathsep}{env.get("PATH", "")}'
    if device == 'cpu':
        # mmcv turns to CUDA wherever torch sees a GPU, whatever FORCE_CUDA says.
        env.update(FORCE_CUDA='0', CUDA_VISIBLE_DEVICES='')
    else:
        env['FORCE_CUDA'] = '1'

    build = folder / 'build'
    source = unpack_source(version, build, console)
    console.line(
        f'compiling mmcv {version} for {device}, {jobs} files at a time; about ten minutes on two '
        f'cores, longer with CUDA, once per machine; log {os.path.relpath(BUILD_LOG, ROOT)}'
    )
    BUILD_LOG.unlink(missing_ok=True)
    BUILD_LOG.touch()
    wheels = build / 'wheels'
    shutil.rmtree(wheels, ignore_errors=True)
    arguments = ['wheel', '--no-build-isolation', '--no-deps', '-v', '--wheel-dir', wheels, source]
    try:
        run_pip(arguments, f'compiling mmcv {version}', console, BUILD_LOG, env, lock)
    except SetupError as error:
        if device == 'cpu':
            raise
        raise SetupError(
            f'{error}\nTo do without operators on the GPU: FORCE_CUDA=0 make setup'
        ) from None
    wheel = next(wheels.glob('*.whl'), None)
    if wheel is None or not wheel_has_ops(wheel):
        raise SetupError(
            f'mmcv was built without its operators; see {os.path.relpath(BUILD_LOG, ROOT)}. '
            f'Remove {build} and run make setup again.'
        )
    stored = store_wheel(wheel, folder)
    shutil.rmtree(build, ignore_errors=True)
    return stored


def install_wheel(wheel: Path, console: Console, label: str) -> None:
    """Install mmcv from a wheel, over any other build of the same version."""
    arguments = ['install', '--no-deps', '--force-reinstall', wheel]
    run_pip(arguments, f'installing mmcv from {label}', console)


def ops_error(device: str) -> str:
    """Return what is wrong with the installed mmcv's operators, ``''`` if they work."""
    code = 'from mmcv.ops import nms, RoIAlign, get_compiling_cuda_version as cuda\nprint(cuda())'
    status, output = run_python(code)
    if status:
        return output
    if device != 'cpu' and 'not available' in output:
        return 'the operators were compiled without CUDA'
    return ''


def install_mmcv(version: str, stack: Sequence[str], console: Console) -> None:
    """Install mmcv with working operators and what it depends on.

    The cache comes first, then a ready-made wheel, then the compiler. A wheel whose operators
    cannot be loaded (made for another torch or another system) is dropped for the next source.

    Args:
        version: mmcv's version.
        stack: All requirements, so that mmcv's own do not move the others.
        console: Where progress goes.

    Raises:
        SetupError: If no source gives working operators.
    """
    probe = probe_machine()
    device, note = choose_device(probe, os.environ)
    if note:
        console.line(f'note: {note}')
    key = cache_key(version, probe.torch_version, probe.python_tag, probe.platform, device)
    folder = cache_root(os.environ) / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'lock').touch()
    except OSError as error:
        raise SetupError(
            f'the cache folder {folder} cannot be written ({error.strerror}); set '
            'GREENMIM_MM_CACHE to one that can'
        ) from None

    def works(wheel: Path, label: str) -> bool:
        install_wheel(wheel, console, label)
        run_pip(['install', *stack], 'installing what mmcv depends on', console)
        ensure_cv2(console)
        error = ops_error(device)
        if not error:
            console.line(f'checked mmcv.ops: nms and RoIAlign can be imported ({device})')
        elif not re.search(r'_ext|undefined symbol|\.so\b|without CUDA', error):
            raise failure('importing mmcv.ops', error, SETUP_LOG)
        return not error

    with locked(folder / 'lock', console, 'compiles mmcv') as lock:
        wheel = cached_wheel(folder, console)
        if wheel is not None:
            if works(wheel, f'the cache, {folder}'):
                return
            console.line('the cached mmcv does not fit this system, dropped it')
            wheel.unlink()
        with tempfile.TemporaryDirectory() as temporary:
            wheel = download_wheel(version, Path(temporary), console)
            if wheel is not None:
                if works(wheel, 'a ready-made wheel'):
                    store_wheel(wheel, folder)
                    return
                console.line('the ready-made mmcv does not fit this torch, compiling it instead')
        wheel = build_wheel(version, probe, device, folder, console, lock)
        if works(wheel, 'the compiled wheel'):
            return
    raise SetupError(
        f'mmcv was compiled, but its operators cannot be imported (see {SETUP_LOG}). Remove .venv '
        f'and {folder}, then run make setup again; if that does not help, the compiler and torch '
        'do not fit each other: set CXX to another compiler.'
    )


def ensure_cv2(console: Console) -> None:
    """See that ``import cv2`` works, on a system without libGL as well.

    mmcv requires opencv-python, and one of mmdet's requirements opencv-python-headless. Both unpack
    into the same folder, and whichever came last wins. The former needs libGL, which servers and
    containers often lack, so the latter is put on top where the import fails.

    Raises:
        SetupError: If neither can be imported.
    """
    status, output = run_python('import cv2; print(cv2.__version__)')
    if status == 0:
        return
    query = "from importlib.metadata import version; print(version('opencv-python'))"
    missing, installed = run_python(query)
    wanted = 'opencv-python-headless' + ('' if missing else f'=={installed.split()[-1]}')
    run_pip(
        ['install', '--no-deps', '--force-reinstall', wanted],
        'installing opencv-python-headless over opencv-python, which needs a display library',
        console,
    )
    status, output = run_python('import cv2; print(cv2.__version__)')
    if status:
        hint = 'On Debian and Ubuntu try: apt-get install libgl1 libglib2.0-0. '
        raise failure('importing cv2', output, SETUP_LOG, hint)


def set_up(console: Console) -> None:
    """Do every step that is needed and write the stamp last.

    Raises:
        SetupError: If a step fails.
    """
    files = {path.stem: path for path in (ROOT / 'requirements').glob('*.txt')}
    requirements = {name: parse_requirements(files[name].read_text()) for name in files}
    pins = requirements['maintained']
    mmcv_version = pinned_version(pins, MMCV)
    pair = [f'{name}=={pinned_version(pins, name)}' for name in TORCH_PAIR]
    stack = [line for name in STACK for line in requirements[name]]
    without_mmcv = [line for line in stack if requirement_name(line) != MMCV]

    ensure_venv(console)
    STAMP.unlink(missing_ok=True)
    SETUP_LOG.unlink(missing_ok=True)
    SETUP_LOG.touch()
    run_pip(['install', *requirements['build']], 'installing the build tools', console)
    run_pip(['install', *pair], f'installing {" and ".join(pair)}', console)
    run_pip(['install', *without_mmcv], 'installing the pinned stack', console)
    install_mmcv(mmcv_version, stack, console)
    editable = ['install', '--no-build-isolation', '--no-deps', '--editable', ROOT]
    run_pip(editable, 'installing greenmim_mm in editable mode', console)
    STAMP.write_text(stamp_digest(ROOT, venv_python_version(VENV) or ''))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the set-up and return the exit status."""
    parser = argparse.ArgumentParser(description='Make .venv with the pinned stack.')
    parser.add_argument('--force', action='store_true', help='go through all steps again')
    args = parser.parse_args(argv)
    console = Console(time.monotonic())
    # End like an interrupt, so that the command that runs is ended too.
    for name in ('SIGTERM', 'SIGHUP'):
        signal.signal(getattr(signal, name), signal.default_int_handler)
    try:
        check_python(sys.version_info)
        if not args.force and is_up_to_date():
            print('environment up to date')
            return 0
        with locked(Path(__file__), console, 'sets up this environment'):
            # Whoever held the lock may have done the work.
            if args.force or not is_up_to_date():
                set_up(console)
        console.line('environment ready: .venv/bin/python')
    except SetupError as error:
        print(f'\nerror: {error}', file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print('\ninterrupted; run make setup again to go on', file=sys.stderr, flush=True)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
