"""Errors of users in one line, with one exit code, for all command lines."""

import argparse
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn

from ..text import printable

EXIT_REFUSED, EXIT_INTERRUPTED = 2, 130


class UserError(ValueError):
    """The user's input is at fault; the message says what to do."""


class Parser(argparse.ArgumentParser):
    """``ArgumentParser`` that says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """End the program with code 2."""
        self.exit(EXIT_REFUSED, f'{self.prog}: error: {one_line(message)}\n')


@contextmanager
def errors_in_one_line(
    parser: argparse.ArgumentParser,
    *expected: type[BaseException],
    codes: Mapping[type[BaseException], int] | None = None,
) -> Iterator[None]:
    """End the program with one line on stderr if the user's input is at fault, or on Ctrl-C.

    Args:
        parser: Knows the program's name.
        *expected: Errors beside :class:`UserError` that are the user's to mend; others keep their
            traceback.
        codes: Exit codes of errors, which are expected as well; that of all others is 2.
    """
    codes = codes or {}
    try:
        yield
    except KeyboardInterrupt:
        parser.exit(EXIT_INTERRUPTED, f'{parser.prog}: interrupted\n')
    except (UserError, *expected, *codes) as error:
        code = next((c for kind, c in codes.items() if isinstance(error, kind)), EXIT_REFUSED)
        parser.exit(code, f'{parser.prog}: error: {one_line(error) or type(error).__name__}\n')


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """End on SIGTERM and SIGHUP as on an exception, so that temporary files are removed."""

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    # Handlers belong to the main thread.
    mine = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGHUP) if mine else ()
    # Who started this with nohup wants it to outlive the terminal.
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def one_line(text: object, limit: int = 2000) -> str:
    """What a message says, in one line that is fit for a terminal."""
    text = str(text).strip()
    if text.startswith('Caught ') and '\n' in text:
        # A worker's error arrives with its traceback; the last line is for people.
        text = re.sub(r'^[\w.]+: ', '', text.rpartition('\n')[2])
    return printable(text, limit)
