"""A signal is remembered, a second one interrupts, and afterwards everything is as before."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from smolora.runtime import signals
from smolora.runtime.signals import deferred_signals, interrupting_signals


def test_a_signal_is_remembered_by_name():
    with deferred_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_name == "SIGTERM"


def test_a_key_pressed_twice_is_one_wish():
    with deferred_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.signal_name == "SIGINT"


def test_what_the_first_signal_starts_is_said_once_on_stderr(capfd):
    with deferred_signals("saving"):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr() == ("", "\nsmolora: SIGTERM: saving.\n")


def test_without_a_notice_nothing_is_said(capfd):
    with deferred_signals():
        os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr() == ("", "")


def test_a_later_second_signal_interrupts_at_once(monkeypatch):
    monkeypatch.setattr(signals, "_SAME_WISH", 0.0)
    with pytest.raises(KeyboardInterrupt), deferred_signals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_may_unwind_a_block_as_ctrl_c_does(number):
    before = signal.signal(number, signal.default_int_handler)  # Under nohup one is ignored, and would stay so.
    with pytest.raises(KeyboardInterrupt, match=number.name), interrupting_signals():
        os.kill(os.getpid(), number)
    signal.signal(number, before)


def test_a_second_signal_at_once_does_not_cut_the_unwinding_short():
    cleared = []
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"), interrupting_signals():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            cleared.append("all")
    assert cleared == ["all"]


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
