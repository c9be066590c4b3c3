"""What can go wrong for a person, as one tree. The command line turns `exit_code` into the exit status.

    SmoloraError
    ├── ConfigError (ValueError)              2   a key, value, flag, target module or existing run
    ├── DataError (ValueError)                3   data missing or rejected, column missing, prompt past the context
    ├── ModelError (ValueError)               4   no such model, bad or changed checkpoint, adapter on another base
    ├── StorageError (OSError)                5   disk, memory, permission, an output path that can't be written
    ├── BrokenRunError (RuntimeError)         6   non-finite numbers, or declared tensors that did not move
    ├── FolderInUseError (RuntimeError)       7   another process writes in this folder
    ├── FailedElsewhere (RuntimeError)            another process of the same run failed; its code
    └── StoppedBySignal (RuntimeError)       75   stopped by a signal; a safe checkpoint is on disk

Each also is the builtin that a caller would catch. A message says what was found, what is allowed and what to do next.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


class SmoloraError(Exception):
    """A mistake or a condition that a person can act on."""

    exit_code = 1


class ConfigError(SmoloraError, ValueError):
    """A configuration key, a value, a flag or a target that can't be used."""

    exit_code = 2


class DataError(SmoloraError, ValueError):
    """Data that is missing, malformed or unusable for the task."""

    exit_code = 3


class ModelError(SmoloraError, ValueError):
    """A model, checkpoint or adapter that can't be loaded or doesn't fit."""

    exit_code = 4


class StorageError(SmoloraError, OSError):
    """Disk, memory or permission stopped the work."""

    exit_code = 5


class BrokenRunError(SmoloraError, RuntimeError):
    """A run that can't have learned: non-finite numbers, or tensors declared trainable that did not move."""

    exit_code = 6


class FolderInUseError(SmoloraError, RuntimeError):
    """Another process holds the lock of this folder."""

    exit_code = 7


class FailedElsewhere(SmoloraError, RuntimeError):  # noqa: N818 - no error of this process
    """Another process of the same run failed, and the run with it; the exit code is that one's."""

    def __init__(self, message: str, exit_code: int = SmoloraError.exit_code) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StoppedBySignal(SmoloraError, RuntimeError):  # noqa: N818 - no error, the run did as it was told
    """A signal ended the run at the end of a step; a checkpoint of that step is on disk."""

    exit_code = 75


def clause(error: object) -> str:
    """Return what an error says as a part of a sentence that goes on: without a full stop at its end.

    >>> clause(ValueError("Not a parquet file."))
    'Not a parquet file'
    """
    return str(error).rstrip().removesuffix(".")


def did_you_mean(found: str, allowed: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest allowed name, or an empty string.

    >>> did_you_mean("q_projj", ["q_proj", "k_proj"])
    " Did you mean 'q_proj'?"
    """
    nearest = difflib.get_close_matches(found, list(allowed), n=1)
    return f" Did you mean '{nearest[0]}'?" if nearest else ""


def suggest_path(missing: Path) -> str:
    """Return " Did you mean 'x'?" for the path that is nearest, part by part, to one that isn't there; or nothing."""
    found = Path(missing.anchor)
    for part in missing.relative_to(found).parts:
        if os.access(found / part, os.F_OK):  # Path.exists raises where it may not look.
            found /= part
            continue
        is_open = os.access(found, os.R_OK | os.X_OK) and found.is_dir()
        names = [entry.name for entry in found.iterdir()] if is_open else []
        if not (nearest := difflib.get_close_matches(part, names, n=1)):
            return ""
        found /= nearest[0]
    return f" Did you mean '{found}'?" if found != missing else ""


def count_of(number: int, noun: str) -> str:
    """Return a number with the word for what it counts.

    >>> count_of(1, "row"), count_of(1200, "row")
    ('1 row', '1,200 rows')
    """
    return f"{number:,} {noun}{'s' * (number != 1)}"
