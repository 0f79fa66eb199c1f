"""Writing checkpoint files, whole or not at all."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .reading import CONFIG_FILE, WEIGHTS_FILE

TORCH_SUFFIXES = ('.pth', '.pt', '.bin')
# In the messages of torch's and safetensors' writers.
_WRITE_ERRORS = ('write', 'os error', 'iostream', 'inline_container')
SAFETENSORS_SUFFIX = '.safetensors'


def write_checkpoint(content: Mapping[str, Any], path: str | Path, force: bool = False) -> None:
    """Write a checkpoint whole or not at all.

    Args:
        content: What ``torch.save`` is to write.
        path: Destination; its folder must exist.
        force: Replace an existing file.

    Raises:
        FileExistsError: If ``path`` exists and ``force`` is not given, or is a folder.
        FileNotFoundError: If its folder does not exist.
        OSError: If the file cannot be written, e.g. because the disk is full.
    """
    with atomic_path(path, force) as temporary:
        write_torch(dict(content), temporary)


def write_torch(content: Mapping[str, Any], path: Path) -> None:
    """``torch.save``, with an ``OSError`` if it fails for want of space or permission."""
    with _os_errors(path):
        torch.save(content, path)


def write_safetensors(
    state_dict: Mapping[str, Tensor], path: Path, meta: Mapping[str, Any]
) -> None:
    """Write ``.safetensors``; its metadata are strings.

    The key ``format`` is taken: it names the framework, and Hugging Face's loaders insist on it.
    A format of ours stands under ``checkpoint_format``.
    """
    strings = {
        'checkpoint_format' if key == 'format' else key: (
            value if isinstance(value, str) else json.dumps(value)
        )
        for key, value in meta.items()
    }
    with _os_errors(path):
        save_file(_separate(state_dict), path, {**strings, 'format': 'pt'})


def write_folder(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any], meta: Mapping[str, Any], path: Path
) -> None:
    """Fill a folder with the two files that Hugging Face's ``from_pretrained`` takes."""
    write_safetensors(state_dict, path / WEIGHTS_FILE, meta)
    with _os_errors(path):
        (path / CONFIG_FILE).write_text(json.dumps(dict(config), indent=2) + '\n', 'utf-8')
    # safetensors makes files that their owner alone may read.
    os.chmod(path / WEIGHTS_FILE, 0o666 & ~_umask())


def _separate(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors takes them: contiguous, and no two that share memory."""
    seen: set[tuple[int, int]] = set()
    result = {}
    for key, value in state_dict.items():
        value = value.detach().contiguous()
        place = (value.untyped_storage().data_ptr(), value.storage_offset())
        if value.numel() and place in seen:
            value = value.clone()
        seen.add(place)
        result[key] = value
    return result


@contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    """Turn what libraries raise when the system refuses to write into ``OSError``."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        # The C++ and Rust code below torch and safetensors hides the system's error in a text.
        text = str(error)
        if not any(word in text.lower() for word in _WRITE_ERRORS):
            raise
        line = next(iter(text.splitlines()), '')
        raise OSError(
            f'{path.parent} could not be written to ({line}); is the disk full?'
        ) from error


def check_space(path: str | Path, num_bytes: int) -> None:
    """Raise ``OSError`` if the disk of ``path`` has no room for so many bytes."""
    free = shutil.disk_usage(Path(path).absolute().parent).free
    if free < num_bytes:
        raise OSError(
            f'{path} needs {num_bytes / 1e6:.0f} MB and its disk has {free / 1e6:.0f} MB left; '
            'make room or choose another disk'
        )


def check_destination(path: str | Path, force: bool = False) -> None:
    """Raise unless a file can be written to ``path``; better before long work than after it.

    Raises:
        FileExistsError: If ``path`` exists and ``force`` is not given, or is a folder.
        FileNotFoundError: If its folder does not exist.
    """
    path = Path(path)
    if path.is_dir():
        raise FileExistsError(f'{path} is a folder; give the name of a file')
    # A link that leads nowhere is there, too.
    if os.path.lexists(path) and not force:
        raise FileExistsError(f'{path} exists; choose another path or overwrite it with --force')
    _check_parent(path)


def check_folder_destination(path: str | Path, force: bool = False) -> None:
    """Raise unless a folder with ``config.json`` and weights can be written to ``path``.

    Raises:
        FileExistsError: If ``path`` is a file, or a folder that holds anything but these two, or
            these two and ``force`` is not given.
        FileNotFoundError: If the folder that it is to lie in does not exist.
    """
    path = Path(path)
    if path.is_dir():
        inside = {entry.name for entry in path.iterdir()}
        if foreign := sorted(inside - {CONFIG_FILE, WEIGHTS_FILE}):
            raise FileExistsError(
                f'{path} holds other things, e.g. {foreign[0]}; name a new folder'
            )
        if inside and not force:
            raise FileExistsError(f'{path} is not empty; replace what it holds with --force')
    elif os.path.lexists(path):
        raise FileExistsError(f'{path} is a file; this format takes the name of a folder')
    _check_parent(path)


def _check_parent(path: Path) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(f'folder {path.parent} does not exist; create it first')


def check_apart(src: str | Path, dst: str | Path) -> None:
    """Raise ``FileExistsError`` if one path lies inside the other: writing could destroy it."""
    first, second = Path(src).resolve(), Path(dst).resolve()
    if first != second and (first.is_relative_to(second) or second.is_relative_to(first)):
        inner, outer = (src, dst) if first.is_relative_to(second) else (dst, src)
        raise FileExistsError(f'{inner} lies inside {outer}; choose a place apart from it')


@contextmanager
def atomic_path(path: str | Path, force: bool = False) -> Iterator[Path]:
    """Path of a temporary file beside ``path`` that takes its place unless the block fails.

    Raises:
        FileExistsError: If ``path`` exists and ``force`` is not given, or is a folder.
        FileNotFoundError: If its folder does not exist.
    """
    path = Path(path)
    check_destination(path, force)
    # Loaders go by the suffix, so that the temporary file has it too.
    handle, name = tempfile.mkstemp(
        dir=path.parent, prefix=f'.{path.stem}.', suffix=f'.tmp{path.suffix}'
    )
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o666 & ~_umask())
        if force or not _linked(Path(name), path):
            os.replace(name, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)


def _linked(name: Path, path: Path) -> bool:
    """Give a file one more name unless another file has got it meanwhile.

    Renaming would replace that. False where the file system has no links.
    """
    try:
        os.link(name, path)
    except FileExistsError:
        raise FileExistsError(
            f'{path} exists; choose another path or overwrite it with --force'
        ) from None
    except OSError:
        check_destination(path)
        return False
    return True


@contextmanager
def atomic_folder(path: str | Path, force: bool = False) -> Iterator[Path]:
    """Path of a temporary folder beside ``path`` that takes its place unless the block fails.

    Raises:
        FileExistsError: See :func:`check_folder_destination`.
        FileNotFoundError: If the folder that it is to lie in does not exist.
    """
    path = Path(path)
    check_folder_destination(path, force)
    name = Path(tempfile.mkdtemp(dir=path.parent, prefix=f'.{path.name}.'))
    old = name / 'replaced'
    try:
        new = name / 'new'
        new.mkdir()
        yield new
        if force and path.exists():
            # What was written to it meanwhile may be anybody's.
            check_folder_destination(path, force)
            os.replace(path, old)
        try:
            os.replace(new, path)
        except OSError as error:
            if old.exists():
                os.replace(old, path)
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise FileExistsError(
                    f'{path} exists; choose another path or overwrite it with --force'
                ) from None
            raise
    finally:
        shutil.rmtree(name, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
