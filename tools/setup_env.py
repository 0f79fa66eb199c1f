"""Make an environment with the pinned stack, mmcv's operators and this package.

Needs nothing but a Python; ``make setup`` runs it::

    python3.11 tools/setup_env.py [--stack openmmlab] [--force]

It installs torch and torchvision as one pair, mmcv *with its operators* (from the cache, or
compiled beside that torch, once per machine), the rest of the stack and this package. While its
stamp fits the requirement files, a further run does nothing. ``setup.log`` in the environment has
all output. ``GREENMIM_MM_CACHE`` (cache folder), ``MAX_JOBS`` (compilers at a time), ``CXX``,
``FORCE_CUDA`` and ``TORCH_CUDA_ARCH_LIST`` are honoured.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Python compiles what is imported; doing so for all of torch takes most of a minute.
INSTALL = ('install', '--no-compile', '--disable-pip-version-check')
BYTES_PER_JOB = 2 * 1024**3  # one compiler of mmcv's sources takes up to about that
# Raise it when the steps change so that an environment made by an older script must be redone.
SCRIPT_VERSION = 3


@dataclass(frozen=True)
class Stack:
    """One of the two generations of OpenMMLab, which share their import names."""

    name: str  # its requirements are in requirements/<name>.txt
    mmcv: str  # project name of mmcv
    setuptools: str  # what mmcv was seen to build with
    newest_python: tuple[int, int]  # that its torch exists for
    extras: tuple[str, ...] = ()  # more of requirements/, which exist for this stack alone


STACKS = {
    'maintained': Stack('maintained', 'onedl-mmcv', 'setuptools==81.*', (3, 12), ('segmentation',)),
    'openmmlab': Stack(
        'openmmlab', 'mmcv', 'setuptools<70', (3, 11), ('openmmlab-segmentation', 'openmmlab-tests')
    ),
}


class SetupError(RuntimeError):
    """A failure that the user can act on; its message says how, and quotes the end of an output."""

    def __init__(self, message: str, output: str = '') -> None:
        end = (line[:300] for line in output.strip().splitlines()[-25:])
        super().__init__('\n  | '.join([message, *end]))


def check_python(version: Sequence[int], stack: Stack, remedy: str) -> None:
    """Refuse a Python that the stack does not exist for."""
    if not (3, 10) <= tuple(version[:2]) <= stack.newest_python:
        raise SetupError(
            f'Python {version[0]}.{version[1]} cannot hold the stack {stack.name}: 3.10 to '
            f'3.{stack.newest_python[1]} is needed. {remedy}'
        )


def pinned(requirements: str, name: str) -> str:
    """Return the line ``name==version`` of a requirements file, without comments."""
    if match := re.search(rf'^{re.escape(name)}==[^\s#]+', requirements, re.MULTILINE):
        return match[0]
    raise SetupError(f"the requirements of the stack must pin {name} as '{name}==VERSION'")


@dataclass(frozen=True)
class Probe:
    """What the environment says about the installed torch and the machine."""

    torch_version: str  # such as '2.11.0+cu130'
    cuda_version: str  # that torch was built for, '' for a CPU build
    capabilities: list[str]  # of the visible GPUs, such as ['90']
    nvcc_version: str  # of the CUDA compiler, '' if there is none
    python_tag: str  # such as 'cp311'
    platform: str  # such as 'linux-x86_64'
    python_header: str  # where Python.h must lie
    memory: int  # bytes to be had


PROBE_CODE = r"""
import contextlib, json, pathlib, re, subprocess, sys, sysconfig
import psutil, torch
from torch.utils.cpp_extension import CUDA_HOME
gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
nvcc, memory = '', psutil.virtual_memory().available
with contextlib.suppress(OSError, TypeError):
    told = subprocess.run([CUDA_HOME + '/bin/nvcc', '--version'], capture_output=True, text=True)
    nvcc = ''.join(re.findall(r'release (\d+\.\d+)', told.stdout)[:1])
with contextlib.suppress(OSError, ValueError):  # a container's share
    memory = min(memory, int(pathlib.Path('/sys/fs/cgroup/memory.max').read_text()))
print('PROBE' + json.dumps(dict(
    torch_version=torch.__version__,
    cuda_version=torch.version.cuda or '',
    capabilities=sorted({'%d%d' % torch.cuda.get_device_capability(i) for i in gpus}),
    nvcc_version=nvcc,
    python_tag='cp%d%d' % sys.version_info[:2],
    platform=sysconfig.get_platform(),
    python_header=sysconfig.get_path('include') + '/Python.h',
    memory=memory,
)))
"""


def choose_device(probe: Probe, env: Mapping[str, str]) -> tuple[str, str]:
    """Decide what mmcv's operators are compiled for.

    CUDA operators need a visible GPU and a CUDA compiler of torch's own major version.
    ``FORCE_CUDA=1`` compiles them without a GPU, ``FORCE_CUDA=0`` never does.

    Returns:
        ``'cpu'`` or such as ``'cu130-sm90'``, and a note for the user, which may be empty.
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
    remedy = 'for the GPU install the CUDA toolkit and run tools/setup_env.py --force'
    return 'cpu', f"mmcv's operators will run on the CPU only: {obstacle}; {remedy}"


def cache_folder(requirement: str, probe: Probe, device: str, env: Mapping[str, str]) -> Path:
    """Return the cache folder of the mmcv that fits exactly one binary interface."""
    parts = [requirement.replace('==', '-'), f'torch-{probe.torch_version}']
    parts += [probe.python_tag, probe.platform, device]
    root = Path(env.get('GREENMIM_MM_CACHE') or '~/.cache/greenmim_mm').expanduser().resolve()
    return root / '_'.join(re.sub(r'[^A-Za-z0-9._+-]+', '-', part) for part in parts)


def max_jobs(cores: int, memory: int, env: Mapping[str, str]) -> int:
    """Return how many compilers may run at a time; a ``MAX_JOBS`` in ``env`` wins."""
    if env.get('MAX_JOBS', '').strip('0').isdigit():
        return int(env['MAX_JOBS'])
    return max(1, min(cores, memory // BYTES_PER_JOB))


def find_compiler(env: Mapping[str, str]) -> str:
    """Return the C++ compiler; a ``CXX`` in ``env``, which may carry a launcher and flags, wins."""
    candidates = [env['CXX']] if env.get('CXX') else ['c++', 'g++', 'clang++']
    for candidate in candidates:
        if shutil.which(candidate.split()[0], path=env.get('PATH')):
            return candidate
    raise SetupError(
        f'no C++ compiler found (tried {", ".join(candidates)}). Install one (Debian, Ubuntu: '
        'apt-get install g++; Fedora, RHEL: dnf install gcc-c++; macOS: xcode-select --install) or '
        'set CXX to its path, and run make setup again'
    )


def wheel_has_ops(path: Path) -> bool:
    """Tell whether a file is a whole wheel that holds mmcv's compiled operators."""
    with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as wheel:
        ops = any(re.fullmatch(r'mmcv/_ext[^/]*\.(so|pyd)', name) for name in wheel.namelist())
        return ops and wheel.testzip() is None
    return False


def failure_hint(output: str) -> str:
    """Return what to do about a failed command, a sentence with a space at its end, or ``''``."""
    if re.search(r'No space left on device|Disk quota exceeded', output):
        return 'The disk is full: the environment takes about 6 GB, the build 1 GB more. '
    if re.search(r'Killed signal terminated|[Cc]annot allocate memory|out of memory', output):
        return 'Memory ran out: set MAX_JOBS=1 and run make setup again. '
    if re.search(r'Connection|[Tt]imed? ?out|name resolution|HTTP error 5|5\d\d Server', output):
        return 'The package index cannot be reached: check the network and proxy settings. '
    return ''


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, waiting for whoever holds it."""
    with path.open('rb') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print('waiting for another set-up to end', flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Environment:
    """The virtual environment in a folder, which may not be there yet, of one stack."""

    def __init__(self, folder: Path, stack: Stack) -> None:
        self.folder, self.stack = folder, stack
        self.python = folder / 'bin' / 'python'
        self.stamp, self.log = folder / 'setup.stamp', folder / 'setup.log'

    def digest(self) -> str:
        """Hash all that decides what it holds; the repository's place counts as well."""
        facts = [SCRIPT_VERSION, str(ROOT), self.stack.name, sys.platform, os.uname().machine]
        digest = hashlib.sha256(json.dumps(facts).encode())
        paths = sorted((ROOT / 'requirements').glob('*.txt'))
        paths += [ROOT / 'setup.py', ROOT / 'greenmim_mm/version.py', self.folder / 'pyvenv.cfg']
        for path in paths:
            data = path.read_bytes()
            digest.update(f'\0{path.name}\0{len(data)}\0'.encode() + data)
        return digest.hexdigest()

    def is_up_to_date(self) -> bool:
        """Tell whether the stamp fits the files, and whether there is a Python at all."""
        with contextlib.suppress(OSError):
            # exists() follows the link to the base Python, which may have been removed.
            return self.stamp.read_text() == self.digest() and self.python.exists()
        return False

    def run(self, *arguments: str | Path, env: Mapping[str, str] | None = None) -> tuple[bool, str]:
        """Run its Python; tell whether that went well, and what was printed, which is logged."""
        command = [str(self.python), *map(str, arguments)]
        with self.log.open('a+', encoding='utf-8', errors='replace') as log:
            log.write(f'\n$ {" ".join(command)}\n')
            log.flush()
            start = log.tell()
            # Not in the repository: its folders must not shadow installed packages.
            settings = dict(cwd=self.folder, env=env, stdin=subprocess.DEVNULL)
            result = subprocess.run(command, stdout=log, stderr=log, **settings)
            log.seek(start)
            return result.returncode == 0, log.read()

    def pip(self, label: str, *arguments: str | Path, env: Mapping[str, str] | None = None) -> None:
        """Run pip; raise :class:`SetupError` with the end of its output if it fails."""
        began = time.monotonic()
        print(f'{label} ...', flush=True)
        fine, output = self.run('-m', 'pip', *arguments, env=env)
        if not fine:
            raise SetupError(f'{label} failed. {failure_hint(output)}See {self.log}:', output)
        print(f'    done in {time.monotonic() - began:.0f} s', flush=True)


def ensure_venv(venv: Environment) -> None:
    """Make the environment, or make it anew if it is broken."""
    folder = venv.folder
    if folder.exists() and any(folder.iterdir()) and not (folder / 'pyvenv.cfg').exists():
        raise SetupError(f'{folder} is no virtual environment; move it away and try again')
    if venv.python.exists():
        fine, told = venv.run('-c', 'import pip, sys; print(*sys.version_info[:2])')
        if fine:
            remedy = f'Remove {folder} and try again.'
            return check_python([*map(int, told.split())], venv.stack, remedy)
    print(f'making {folder} with Python {sys.version.split()[0]} ...', flush=True)
    command = [sys.executable, '-m', 'venv', '--clear', str(folder)]
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if (result := subprocess.run(command, **pipes, text=True)).returncode:
        hint = f'on Debian, Ubuntu: apt-get install python3.{sys.version_info[1]}-venv'
        raise SetupError(f'{sys.executable} cannot make an environment ({hint})', result.stdout)


def build_wheel(venv: Environment, mmcv: str, probe: Probe, device: str, folder: Path) -> Path:
    """Compile the requirement ``mmcv`` with its operators and keep the wheel in a cache folder."""
    compiler = find_compiler(os.environ)
    if not Path(probe.python_header).exists():
        raise SetupError(
            f"{probe.python_header} is missing. Install Python's headers (Debian, Ubuntu: apt-get "
            'install python3-dev; Fedora, RHEL: dnf install python3-devel) and run make setup again'
        )
    jobs = max_jobs(os.cpu_count() or 1, probe.memory, os.environ)
    env = dict(os.environ, MMCV_WITH_OPS='1', MAX_JOBS=str(jobs), CXX=compiler, FORCE_CUDA='1')
    if device == 'cpu':
        # mmcv turns to CUDA wherever torch sees a GPU, whatever FORCE_CUDA says.
        env.update(FORCE_CUDA='0', CUDA_VISIBLE_DEVICES='')
    # Python's own flags ask for debug symbols, which slow the build and swell the wheel.
    env['CFLAGS'] = f'{env.get("CFLAGS", "")} -g0'.strip()
    # torch calls ninja by name, and the environment may not be activated.
    env['PATH'] = f'{venv.python.parent}{os.pathsep}{env.get("PATH", "")}'
    label = f'compiling {mmcv} for {device} (ten minutes on two cores; see {venv.log})'
    # Isolated from the installed torch, mmcv would be built without its operators.
    options = ('--no-build-isolation', '--no-deps', '--no-binary=:all:', '-v', '--wheel-dir')
    # Beside its place in the cache, so that moving it there is one step: nobody sees half of it.
    with tempfile.TemporaryDirectory(dir=folder, prefix='.building-') as temporary:
        venv.pip(label, 'wheel', *options, temporary, mmcv, env=env)
        wheel = next(Path(temporary).glob('*.whl'))
        if not wheel_has_ops(wheel):
            raise SetupError(f'{mmcv} was built without its operators; see {venv.log}')
        return wheel.replace(folder / wheel.name)


def install_mmcv(venv: Environment, requirement: str) -> tuple[Path, str]:
    """Install mmcv from the cache, or compile it; return the wheel and the device it is for."""
    fine, output = venv.run('-c', PROBE_CODE)
    match = re.search(r'^PROBE(\{.*\})$', output, re.MULTILINE)
    if not fine or not match:
        raise SetupError(f'importing torch failed; remove {venv.folder} and try again', output)
    probe = Probe(**json.loads(match[1]))
    device, note = choose_device(probe, os.environ)
    print(note, end='\n' if note else '')
    folder = cache_folder(requirement, probe, device, os.environ)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'lock').touch()
    except OSError as error:
        told = f'{folder} cannot be written ({error.strerror})'
        raise SetupError(f'{told}; set GREENMIM_MM_CACHE to one that can') from None
    with locked(folder / 'lock'):
        wheel = next(filter(wheel_has_ops, sorted(folder.glob('*.whl'))), None)
        wheel = wheel or build_wheel(venv, requirement, probe, device, folder)
    venv.pip(f'installing {wheel}', *INSTALL, '--no-deps', '--force-reinstall', wheel)
    return wheel, device


def check_imports(venv: Environment, wheel: Path, device: str) -> None:
    """See that cv2 and mmcv can be imported; drop a wheel whose operators alone cannot.

    mmcv requires opencv-python, and one of mmdet's requirements opencv-python-headless. Both unpack
    into the same folder, and whichever came last wins. The former needs libGL, which servers and
    containers often lack: the latter is then put on top.
    """
    if not venv.run('-c', 'import cv2')[0]:
        query = "from importlib.metadata import version; print(version('opencv-python'))"
        found, version = venv.run('-c', query)
        wanted = 'opencv-python-headless' + (f'=={version.split()[-1]}' if found else '')
        label = 'installing opencv-python-headless: opencv-python needs a display library'
        venv.pip(label, *INSTALL, '--no-deps', '--force-reinstall', wanted)
    hints = dict(cv2='; on Debian, Ubuntu: apt-get install libgl1 libglib2.0-0', mmcv='')
    for name, hint in hints.items():
        if not (result := venv.run('-c', f'import {name}'))[0]:
            raise SetupError(f'importing {name} failed{hint}', result[1])
    code = 'from mmcv.ops import nms, RoIAlign, get_compiling_cuda_version as cuda\nprint(cuda())'
    fine, output = venv.run('-c', code)
    if not fine or (device != 'cpu' and 'not available' in output):
        wheel.unlink(missing_ok=True)
        hint = f'{wheel} was removed: make setup compiles it again (CXX names another compiler)'
        raise SetupError(f"importing mmcv's operators failed; {hint}", output)


def set_up(venv: Environment) -> None:
    """Do every step and write the stamp last."""
    stack = venv.stack
    names = (stack.name, 'runtime', 'demo', 'tests', 'docs', *stack.extras, 'build')
    files = [f'{ROOT}/requirements/{name}.txt' for name in names]
    pins = Path(files[0]).read_text(encoding='utf-8')
    pair = [pinned(pins, name) for name in ('torch', 'torchvision')]
    ensure_venv(venv)
    venv.stamp.unlink(missing_ok=True)
    venv.log.unlink(missing_ok=True)
    venv.pip('installing the build tools', *INSTALL, f'-r{files[-1]}', stack.setuptools)
    venv.pip(f'installing {" and ".join(pair)}', *INSTALL, *pair, f'-c{files[0]}')
    wheel, device = install_mmcv(venv, pinned(pins, stack.mmcv))
    # setuptools again: a newer one may not have what packages of this stack import.
    venv.pip('installing all', *INSTALL, *map('-r{}'.format, files), stack.setuptools)
    check_imports(venv, wheel, device)
    editable = ('--no-build-isolation', '--no-deps', '--editable', ROOT)
    venv.pip('installing greenmim_mm in editable mode', *INSTALL, *editable)
    venv.stamp.write_text(venv.digest())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the set-up and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--stack', choices=STACKS, default='maintained', help='default: maintained')
    parser.add_argument('--force', action='store_true', help='go through all steps again')
    args = parser.parse_args(argv)
    stack = STACKS[args.stack]
    other = f'-{stack.name}-py3{sys.version_info[1]}'
    venv = Environment(ROOT / f'.venv{"" if stack.name == "maintained" else other}', stack)
    try:
        check_python(sys.version_info, stack, 'Name one: make setup PYTHON=/path/to/python3.11')
        if not args.force and venv.is_up_to_date():
            print('environment up to date')
            return 0
        with locked(Path(__file__)):
            if args.force or not venv.is_up_to_date():  # by whoever held the lock
                set_up(venv)
    except SetupError as error:
        print(f'\nerror: {error}', file=sys.stderr)
        return 1
    print(f'environment ready: {venv.python}')
    return 0


if __name__ == '__main__':
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit('interrupted; run make setup again to go on')
