"""Files and folders that are written whole or not at all."""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_EXISTS = '{} exists; choose another path or overwrite it with --force'


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
        raise FileExistsError(_EXISTS.format(path))
    _check_parent(path)


def check_folder_destination(
    path: str | Path, force: bool = False, check_replaced: Callable[[Path], None] | None = None
) -> None:
    """Raise unless a folder can be written to ``path``. An empty folder is as good as none.

    Args:
        path: The folder.
        force: Replace what it holds.
        check_replaced: Raises ``FileExistsError`` for a folder that holds anything but an earlier
            result of the same kind; None lets nothing but an empty folder be replaced.

    Raises:
        FileExistsError: If ``path`` is a file, or a folder that may not be replaced.
        FileNotFoundError: If the folder that it is to lie in does not exist.
    """
    path = Path(path)
    if path.is_dir():
        if first := next(path.iterdir(), None):
            if check_replaced is None:
                raise FileExistsError(
                    f'{path} holds other things, e.g. {first.name}; name a new folder'
                )
            check_replaced(path)
            if not force:
                raise FileExistsError(f'{path} is not empty; replace what it holds with --force')
    elif os.path.lexists(path):
        raise FileExistsError(f'{path} is a file; give the name of a folder')
    _check_parent(path)


def check_apart(src: str | Path, dst: str | Path) -> None:
    """Raise ``FileExistsError`` if a path is the other, or inside it: writing could destroy it."""
    first, second = Path(src).resolve(), Path(dst).resolve()
    if first.exists() and second.exists() and first.samefile(second):
        raise FileExistsError(f'{dst} is the source itself; write to another one')
    if first != second and (first.is_relative_to(second) or second.is_relative_to(first)):
        inner, outer = (src, dst) if first.is_relative_to(second) else (dst, src)
        raise FileExistsError(f'{inner} lies inside {outer}; choose a place apart from it')


def check_space(path: str | Path, num_bytes: int) -> None:
    """Raise ``OSError`` if the disk of ``path`` has no room for so many bytes."""
    free = shutil.disk_usage(Path(path).absolute().parent).free
    if free < num_bytes:
        raise OSError(
            f'{path} needs {num_bytes / 1e6:.0f} MB and its disk has {free / 1e6:.0f} MB left; '
            'make room or choose another disk'
        )


@contextmanager
def atomic_path(path: str | Path, force: bool = False) -> Iterator[Path]:
    """Path of a temporary file beside ``path`` that takes its place unless the block fails.

    Raises:
        FileExistsError: If ``path`` exists and ``force`` is not given, or is a folder.
        FileNotFoundError: If its folder does not exist.
    """
    path = Path(path)
    check_destination(path, force)
    # Writers go by the suffix, so that the temporary file has it too.
    handle, name = tempfile.mkstemp(
        dir=path.parent, prefix=f'.{path.stem}.', suffix=f'.tmp{path.suffix}'
    )
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, plain_rights())
        if force or not _linked(Path(name), path):
            os.replace(name, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)


@contextmanager
def atomic_folder(
    path: str | Path, force: bool = False, check_replaced: Callable[[Path], None] | None = None
) -> Iterator[Path]:
    """Path of a temporary folder beside ``path`` that takes its place unless the block fails.

    Args:
        path: The folder to make.
        force: Replace what it holds.
        check_replaced: See :func:`check_folder_destination`.

    Raises:
        FileExistsError: See :func:`check_folder_destination`.
        FileNotFoundError: If the folder that it is to lie in does not exist.
    """
    path = Path(path)
    check_folder_destination(path, force, check_replaced)
    # One level below: mkdtemp's own folder is private, and renaming would keep that.
    name = Path(tempfile.mkdtemp(dir=path.parent, prefix=f'.{path.name}.'))
    new, old = name / 'new', name / 'replaced'
    try:
        new.mkdir()
        yield new
        if force and path.exists():
            # What was written to it meanwhile may be anybody's.
            check_folder_destination(path, force, check_replaced)
            os.replace(path, old)
        try:
            os.replace(new, path)
        except BaseException as error:
            if old.exists():
                os.replace(old, path)
            taken = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
            if isinstance(error, OSError) and error.errno in taken:
                raise FileExistsError(_EXISTS.format(path)) from None
            raise
    finally:
        shutil.rmtree(name, ignore_errors=True)


def plain_rights() -> int:
    """The rights that a new file has by the umask."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _check_parent(path: Path) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(f'folder {path.parent} does not exist; create it first')


def _linked(name: Path, path: Path) -> bool:
    """Give a file one more name unless another file has got it meanwhile.

    Renaming would replace that. False where the file system has no links.
    """
    try:
        os.link(name, path)
    except FileExistsError:
        raise FileExistsError(_EXISTS.format(path)) from None
    except OSError:
        check_destination(path)
        return False
    return True
