"""A signal is remembered, a second one interrupts, and afterwards everything is as before."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from smolora.runtime.signals import deferred_signals


def test_a_signal_is_remembered_by_name():
    with deferred_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_name == "SIGTERM"


def test_a_second_signal_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt), deferred_signals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_the_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    with deferred_signals():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


def test_outside_the_main_thread_nothing_is_installed():
    names = []

    def work():
        with deferred_signals() as stop:
            names.append(stop.signal_name)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert names == [None]
