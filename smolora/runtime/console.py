"""The terminal: people read stderr, so that stdout carries results alone. Nothing here imports torch."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from smolora.errors import DataError

_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "KINETO_LOG_LEVEL": "6",  # torch's profiler announces its start and stop on level 5, above its errors.
}


class StderrConsole(Console):
    """A console on stderr whose work goes on when nobody reads it: after `2>&1 | head`, or in a closed terminal."""

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            self.on_broken_pipe()  # A closed terminal is one too; rich knows the pipe alone.

    def on_broken_pipe(self) -> None:
        """Write nowhere from now on, where rich would end the program."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def stderr_console(quiet: bool = False) -> Console:
    """Return a console on stderr; a quiet one shows nothing but the warnings of `show_log`."""
    return StderrConsole(stderr=True, quiet=quiet, highlight=False)


def print_plainly(console: Console, text: str) -> None:
    """Print text as it is: no markup or emoji read from it, no colours, no line broken at the terminal's width."""
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


def in_minutes(seconds: float) -> str:
    """Return seconds in words.

    >>> in_minutes(83.4), in_minutes(7325)
    ('1:23', '2:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def decoded_input() -> Iterator[None]:
    """Say of bytes that standard input can't decode inside the block what they are.

    Raises:
        DataError: There are some.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"standard input isn't UTF-8 text: {error.reason} at byte {error.start + 1}.") from None


def show_log(console: Console) -> None:
    """Print the package's own log on `console` as plain lines, clear of a live progress line there.

    It replaces what an earlier call set up, and touches no logger but the package's.
    """
    logger = logging.getLogger("smolora")
    logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, ConsoleHandler)]
    logger.addHandler(ConsoleHandler(console))
    logger.setLevel(logging.WARNING if console.quiet else logging.INFO)


def silence_libraries() -> None:
    """Switch off what the libraries show by themselves; call it before they are imported. What the person set stays."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    logger = logging.getLogger("bitsandbytes")  # It tells at every import that an optional package isn't there.
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.ERROR)


class ConsoleHandler(logging.Handler):
    """Prints a log record as a line; what isn't mere information says so."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record; warnings also on a quiet console."""
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        console = stderr_console() if self._console.quiet else self._console
        print_plainly(console, f"{prefix}{record.getMessage()}")
