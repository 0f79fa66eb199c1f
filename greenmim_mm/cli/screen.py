"""What people see: lines, and one that is rewritten."""

import shutil
import sys
import time
from typing import TextIO

# Without a terminal a status line is a line of its own, so that there are few.
_SECONDS_BETWEEN = {True: 0.2, False: 30.0}


class Screen:
    """Lines on a stream, and a last line that is rewritten where the stream is a terminal.

    Args:
        stream: Where to; None for what ``sys.stdout`` is now.
        quiet: Say nothing, as all processes but the first do.
    """

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self.stream = sys.stdout if stream is None else stream
        self.quiet = quiet
        self.terminal = self.stream.isatty()
        self._shown = False
        self._next = 0.0

    def say(self, line: str = '') -> None:
        """Print a line."""
        if not self.quiet:
            self._write(('\r\x1b[K' if self._shown else '') + self._encoded(line) + '\n')
            self._shown = False

    def status(self, line: str, now: bool = False) -> None:
        """Show a line in the place of the last status, unless that is too new.

        Args:
            line: The line.
            now: However new the last one is.
        """
        if self.quiet or (not now and time.monotonic() < self._next):
            return
        self._next = time.monotonic() + _SECONDS_BETWEEN[self.terminal]
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            self._write('\r\x1b[K' + self._encoded(line[:width]))
            self._shown = True
        else:
            self._write(self._encoded(line) + '\n')

    def end_status(self) -> None:
        """Leave the status where it is; what follows goes below."""
        if self._shown:
            self._write('\n')
            self._shown = False

    def _encoded(self, text: str) -> str:
        encoding = self.stream.encoding or 'utf-8'
        return text.encode(encoding, 'backslashreplace').decode(encoding)

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except (BrokenPipeError, ValueError):
            # Nobody looks any more (`| head`); the run goes on.
            self.quiet = True


def clock(seconds: float) -> str:
    """A time for people: '45 s', '12 min', '3 h 20 min', '2 d 4 h'."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f'{seconds:.0f} s'
    if minutes < 60:
        return f'{minutes} min'
    if minutes < 60 * 24:
        return f'{minutes // 60} h {minutes % 60} min'
    return f'{minutes // 1440} d {minutes % 1440 // 60} h'
