"""Errors to exit codes. Our own carry theirs; here are those of Python, torch and the operating system."""

from __future__ import annotations

import errno

from smolora.errors import FailedElsewhere, SmoloraError, StorageError, clause
from smolora.runtime.available_memory import is_out_of_memory
from smolora.runtime.launch import is_main_launched

MISTAKE = 2
UNEXPECTED = 1
INTERRUPTED = 130

_NO_ROOM_OR_RIGHT = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOMEM,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.EMFILE,
}


def explain(error: Exception) -> tuple[str, int] | None:
    """Return a message and an exit code for what a person can act on; None for a bug.

    The message is empty where another process of the run has said it.
    """
    if isinstance(error, FailedElsewhere) and not is_main_launched():
        return "", error.exit_code
    if isinstance(error, SmoloraError):
        return str(error), error.exit_code
    if is_out_of_memory(error):
        return "out of memory. Lower --batch-size or --max-length, or choose a smaller model.", StorageError.exit_code
    if (code := _find_system_code(error)) is not None:
        from smolora.records.staging import advise

        return f"{clause(error)}. {advise(code)}", StorageError.exit_code
    return None


def _find_system_code(error: Exception) -> int | None:
    """Return the system's number of an error about room or rights.

    Python carries it; safetensors and Arrow, written in Rust and C++, say a full disk in the system's words.
    """
    if isinstance(error, OSError) and error.errno in _NO_ROOM_OR_RIGHT:
        return error.errno
    return errno.ENOSPC if "No space left on device" in str(error) else None
