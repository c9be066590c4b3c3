"""Signals that ask a run to stop, held back until a step is whole."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_STOPPING = [signal.SIGINT, signal.SIGTERM]
if sys.platform != "win32":
    _STOPPING.append(signal.SIGHUP)  # The terminal was closed, or its connection lost.


class StopRequest:
    """Whether somebody asked the run to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """Remember the first signal; a second one interrupts at once."""
        if self.signal_name is not None:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name


@contextmanager
def deferred_signals() -> Iterator[StopRequest]:
    """Collect the signals that ask to stop instead of dying by them; outside the main thread nothing can be collected.

    A signal that the process ignores, as under nohup, stays ignored.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    heeded = [number for number in _STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, request.receive) for number in heeded}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
