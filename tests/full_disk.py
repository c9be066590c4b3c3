"""A disk that is full: files of this process stop growing, and a write beyond is refused by the system."""

from __future__ import annotations

from contextlib import contextmanager

import pytest


@contextmanager
def files_of_at_most(size):
    """Let this process write no file further than `size` bytes."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
