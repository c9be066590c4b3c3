"""A file system that is read-only: a folder of a process in a name space of its own, which Linux lets it mount so."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

_MOUNT = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && exec "${@:2}"'
_NAME_SPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def run_read_only(folder, definition, *arguments):
    """Call what `definition` imports as `work` with `folder` and `arguments`, which are paths; return what it said."""
    if (
        not shutil.which("unshare")
        or subprocess.run([*_NAME_SPACE, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("this system lets nobody mount a file system")
    script = f"import pathlib, sys\n{definition}\nwork(*map(pathlib.Path, sys.argv[1:]))"
    command = [*_NAME_SPACE, "bash", "-c", _MOUNT, "bash", str(folder), sys.executable, "-c", script, str(folder)]
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, check=False)
    return done.stderr
