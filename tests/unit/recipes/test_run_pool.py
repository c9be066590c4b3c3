"""Workers: their results, their errors, and their end with the parent's."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from smolora.errors import BrokenRunError, ConfigError, StoppedBySignal, StorageError
from smolora.recipes.run_pool import run_on_processes, run_on_ray
from smolora.runtime import signals


def double(number):
    return 2 * number


def fail(_):
    raise BrokenRunError("it broke")


def die(_):
    os.kill(os.getpid(), signal.SIGKILL)


def be_signalled_twice(_):
    signals._SAME_WISH = 0.0  # In this process alone, which ends with the test.
    with signals.deferred_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)


def count_threads(_):
    return torch.get_num_threads()


def interrupt_parent_and_last(folder):
    """Have the parent stopped, and say by a file if this was let go on to its end."""
    os.kill(multiprocessing.parent_process().pid, signal.SIGINT)
    time.sleep(30)
    (Path(folder) / "went-on").touch()


def test_every_job_has_its_result():
    assert sorted(run_on_processes(double, [1, 2, 3], workers=2)) == [2, 4, 6]


def test_an_error_of_a_run_keeps_its_kind_and_words():
    with pytest.raises(BrokenRunError, match="it broke"):
        list(run_on_processes(fail, [1, 2], workers=1))


def test_a_killed_worker_is_said_to_be_one():
    with pytest.raises(StorageError, match="a worker died"):
        list(run_on_processes(die, [1], workers=1))


def test_a_worker_that_is_signalled_twice_ends_without_a_traceback(capfd):
    with pytest.raises(StorageError, match="a worker died"):
        list(run_on_processes(be_signalled_twice, [1], workers=1))
    assert "Traceback" not in capfd.readouterr().err


def test_workers_share_the_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert list(run_on_processes(count_threads, [0], workers=2)) == [4]
        assert list(run_on_processes(count_threads, [0, 1], workers=2)) == [2, 2]
    finally:
        torch.set_num_threads(before)


def test_ctrl_c_stops_the_workers_too(tmp_path):
    with pytest.raises(StoppedBySignal, match="stopped by SIGINT. The same command goes on"):
        list(run_on_processes(interrupt_parent_and_last, [str(tmp_path)] * 2, workers=1))
    assert not list(tmp_path.iterdir())
    assert not multiprocessing.active_children()


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_its_address_is_refused():
    with pytest.raises(ConfigError, match="Ray isn't installed"):
        list(run_on_ray(double, [1], address="auto"))
