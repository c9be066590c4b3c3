"""A process that gets a signal just before it moves a file to its place."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def run_signalled(number, work, *arguments, moving):
    """Call `work` in a fork, which gets a signal as it is about to rename something to `moving`; return its code."""
    child = os.fork()
    if child == 0:
        sys.addaudithook(lambda event, paths: _is_moving(event, paths, moving) and os.kill(os.getpid(), number))
        code = 1
        try:
            work(*arguments)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _is_moving(event, paths, file):
    return event == "os.rename" and Path(paths[1]) == file.resolve()
