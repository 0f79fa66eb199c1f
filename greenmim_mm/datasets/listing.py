"""Image files in folders, and in lists of files."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from mmengine.logging import print_log

from .errors import DataError

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff')


def find_images(sources: str | Iterable[str]) -> Iterator[str]:
    """Find images in a fixed order.

    Args:
        sources: Folders, image files, or text files with a path on each line (relative ones start
            from the text file's folder; any ending). Folders are searched to any depth, links to
            folders included, each folder once; hidden files and folders are left out.

    Yields:
        Paths.

    Raises:
        DataError: If a source does not exist or is a file of another kind.
    """
    seen: set[tuple[int, int]] = set()
    for source in [sources] if isinstance(sources, str) else sources:
        source = os.path.expanduser(source)
        if os.path.isdir(source):
            yield from _walk(source, seen)
        elif not os.path.isfile(source):
            raise DataError(f'data {source} does not exist; name a folder of images')
        elif source.lower().endswith(EXTENSIONS):
            yield source
        elif source.lower().endswith('.txt'):
            yield from _listed(source)
        else:
            raise DataError(
                f'data {source} is neither a folder, an image ({", ".join(EXTENSIONS)}) nor a '
                'list of images (.txt)'
            )


def _walk(folder: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    # A list instead of recursion: folders may lie deeper than Python's stack.
    waiting = [folder]
    while waiting:
        folder = waiting.pop()
        try:
            status = os.stat(folder)
            # Links may lead back to where they lie.
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            print_log(f'{folder} is passed over: {error.strerror}', 'current', 30)
            continue
        inner = []
        for entry in found:
            if entry.name.startswith('.'):
                continue
            if _holds(entry.is_dir):
                inner.append(entry.path)
            elif entry.name.lower().endswith(EXTENSIONS) and _holds(entry.is_file):
                yield entry.path
        waiting.extend(reversed(inner))


def _holds(check) -> bool:
    try:
        return check()
    except OSError:  # a link to itself
        return False


def _listed(path: str) -> Iterator[str]:
    try:
        lines = Path(path).read_text(encoding='utf-8').splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f'list of images {path} is no text in UTF-8: {error}') from error
    for line in filter(None, map(str.strip, lines)):
        yield os.path.join(os.path.dirname(path), os.path.expanduser(line))
