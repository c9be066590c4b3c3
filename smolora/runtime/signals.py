"""Signals that ask a run to stop, held back until a step is whole."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

_STOPPING = [signal.SIGINT, signal.SIGTERM]
if sys.platform != "win32":
    _STOPPING.append(signal.SIGHUP)  # The terminal was closed, or its connection lost.

SAVING = "finishing this step and saving; another Ctrl-C stops at once, without saving"
"""The notice of a loop that saves."""

_SAME_WISH = 1.0
"""Seconds in which further signals are taken for the first one: a key pressed twice, or a closing terminal's second."""


class StopRequest:
    """Whether somebody asked the run to stop, and by which signal."""

    def __init__(self, notice: str = "") -> None:
        self.signal_name: str | None = None
        self._notice = notice
        self._received = 0.0

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Remember the first signal and say what it starts; one that comes a second later interrupts at once."""
        if self.signal_name is not None:
            if time.monotonic() - self._received >= _SAME_WISH:
                _interrupt(number, frame)
            return
        self.signal_name, self._received = signal.Signals(number).name, time.monotonic()
        if self._notice:
            with suppress(OSError):  # By no print or console: the signal may have come while one of them is locked.
                os.write(2, f"\nsmolora: {self.signal_name}: {self._notice}.\n".encode())


def describe_stop(signal_name: str, step: int, folder: Path | None) -> str:
    """Return what a run says that a signal ended after `step`: what is kept of it, in its folder if it has one."""
    kept = f"A checkpoint of this step is safe in {folder}. Continue with --resume."
    return f"stopped by {signal_name} after step {step}. {kept if folder else 'Nothing was saved: it has no folder.'}"


@contextmanager
def deferred_signals(notice: str = "") -> Iterator[StopRequest]:
    """Collect the signals that ask to stop instead of dying by them; outside the main thread nothing can be collected.

    A signal that the process ignores, as under nohup, stays ignored.

    Args:
        notice: What the first one makes stderr say, however quiet the run; of a worker's, its parent speaks.
    """
    request = StopRequest(notice if multiprocessing.parent_process() is None else "")
    with _handled_by(request.receive):
        yield request


@contextmanager
def interrupting_signals() -> Iterator[None]:
    """Let all signals that ask to stop unwind the block as Ctrl-C does, where SIGTERM would end the process in it.

    Raises:
        KeyboardInterrupt: With the name of the signal.
    """
    received = [-_SAME_WISH]

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(time.monotonic())
        if received[-1] - received[-2] >= _SAME_WISH:  # Else it would cut short what the first one unwinds.
            _interrupt(number, frame)

    with _handled_by(interrupt):
        yield


def _interrupt(number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heeded = [number for number in _STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
