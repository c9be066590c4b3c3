"""A process that gets a signal while it writes a folder under a hidden name, or moves a file to its place."""

from __future__ import annotations

import os
import sys
from pathlib import Path

INTERRUPTED = 130


def run_signalled(number, work, *arguments, moving=None):
    """Call `work` in a fork, which gets a signal with each hidden file that it opens, and return its exit code.

    With `moving`, the path of a file, it gets it just before something is renamed to that.
    """
    child = os.fork()
    if child == 0:
        is_time = _is_writing if moving is None else lambda event, paths: _is_moving(event, paths, moving)
        sys.addaudithook(lambda event, paths: is_time(event, paths) and os.kill(os.getpid(), number))
        code = 1
        try:
            work(*arguments)
            code = 0
        except KeyboardInterrupt:
            code = INTERRUPTED
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _is_writing(event, paths):
    return event == "open" and f"{os.sep}.tmp-" in str(paths[0])


def _is_moving(event, paths, file):
    return event == "os.rename" and Path(paths[1]) == file.resolve()
