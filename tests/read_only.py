"""A file system that is read-only: a folder of a process in a name space of its own, which Linux lets it mount so."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.forked import run_forked

_NEW_USERS, _NEW_MOUNTS = 0x10000000, 0x00020000


def run_read_only(folder, work, *arguments):
    """Call `work` in a fork to which `folder` is read-only, and return its exit code."""
    if not shutil.which("mount") or run_forked(_mount, folder):
        pytest.skip("this system lets nobody mount a file system")
    return run_forked(lambda: (_mount(folder), work(*arguments)))


def _mount(folder):
    user = os.getuid()
    if ctypes.CDLL(None).unshare(_NEW_USERS | _NEW_MOUNTS):
        raise OSError("no name space of its own")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    for options in (["--bind", folder], ["-o", "remount,ro,bind"]):
        subprocess.run(["mount", *options, folder], check=True)
