"""A list of the images that cannot be used, kept by all processes of a run together."""

import fcntl
import os
from itertools import islice

from .errors import DataError

_NAMED = 3


class BadImages:
    """Bad images, each named once with its reason, and how many there may be.

    With a file, all processes that use it know of the same images; without one, each process
    knows of its own.

    Args:
        total: Images of the data set.
        limit: Most bad images that are passed over.
    """

    def __init__(self, total: int, limit: int) -> None:
        self.total = total
        self.limit = limit
        self.path = ''
        self._reasons: dict[str, str] = {}
        self._read = 0

    def __contains__(self, image: str) -> bool:
        return image in self._reasons

    def __len__(self) -> int:
        return len(self._reasons)

    def keep_in(self, path: str) -> None:
        """Keep the list in a file, and take what it holds as known."""
        self.path, self._read = path, 0
        known, self._reasons = self._reasons, {}
        if os.path.exists(path):
            with open(path, 'rb') as file:
                self._update(file)
        for image, reason in known.items():
            self.add(image, reason)

    def add(self, image: str, reason: str) -> None:
        """Name a bad image.

        Raises:
            DataError: If there are too many.
        """
        reason = ' '.join(reason.split())
        if not self.path:
            self._reasons.setdefault(image, reason)
        else:
            # One process at a time: it reads what the others have written, then appends.
            with open(self.path, 'ab+') as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                self._update(file)
                if image not in self._reasons:
                    file.write(f'{_escape(image)}\t{reason}\n'.encode(errors='surrogateescape'))
                    file.flush()
                    self._update(file)
        if len(self) > self.limit:
            raise self.error(f'more than the {self.limit} that are passed over (max_bad)')

    def error(self, why: str) -> DataError:
        """The error that ends a run: the count, the first names, and why it ends."""
        named = ', '.join(f'{k} ({v})' for k, v in islice(self._reasons.items(), _NAMED))
        more = f'; all are named in {self.path}' if self.path else ''
        return DataError(
            f'{len(self)} of {self.total} images cannot be used, {why}; replace or remove '
            f'them: {named}{" ..." if len(self) > _NAMED else ""}{more}'
        )

    def _update(self, file) -> None:
        """Read what has been appended since the last time."""
        file.seek(self._read)
        content = file.read()
        # A process that was killed may have left half a line.
        end = content.rfind(b'\n') + 1
        if end < len(content) and file.writable():
            file.truncate(self._read + end)
        for line in content[:end].decode(errors='surrogateescape').split('\n')[:-1]:
            image, _, reason = line.partition('\t')
            self._reasons.setdefault(_unescape(image), reason)
        self._read += end


def _escape(path: str) -> str:
    """A path on one line: names may hold any character."""
    return path.replace('\\', '\\\\').replace('\n', '\\n').replace('\t', '\\t')


def _unescape(text: str) -> str:
    out = text.replace('\\\\', '\0').replace('\\n', '\n').replace('\\t', '\t')
    return out.replace('\0', '\\')
