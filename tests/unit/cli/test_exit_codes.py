"""Errors of Python, torch and the operating system as messages and exit codes."""

from __future__ import annotations

import errno

import pytest
import torch

from smolora.cli.exit_codes import explain
from smolora.errors import DataError, FailedElsewhere, FolderInUseError, StoppedBySignal


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [(DataError("no rows"), 3), (FolderInUseError("busy"), 7), (StoppedBySignal("SIGTERM"), 75)],
)
def test_our_own_errors_carry_their_code(error, exit_code):
    assert explain(error) == (str(error), exit_code)


def test_what_another_process_has_said_is_not_said_again(monkeypatch):
    failure = FailedElsewhere("process 0: no such file", 3)
    assert explain(failure) == ("process 0: no such file", 3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert explain(failure) == ("", 3)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "x"),
        PermissionError(errno.EACCES, "Permission denied", "x"),
        OSError(errno.EROFS, "Read-only file system", "x"),
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_no_room_and_no_right_to_write_are_5_and_say_what(error):
    message, exit_code = explain(error)
    assert exit_code == 5
    assert str(error) in message
    assert ("Free space" in message) == ("No space" in message)


def test_memory_that_torch_cant_get_is_5():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert explain(caught.value)[1] == 5


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")])
def test_out_of_memory_says_what_to_lower(error):
    assert explain(error) == ("out of memory. Lower --batch-size or --max-length, or choose a smaller model.", 5)


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("shapes differ"), FileNotFoundError(2, "none", "x")])
def test_anything_else_is_a_bug(error):
    assert explain(error) is None
