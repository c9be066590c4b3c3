"""A process that has imported what this one has: a fork begins in milliseconds, a new interpreter after seconds."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

import torch


def start_fork(work: Callable[..., object], *arguments: object) -> int:
    """Call `work` in a fork, on one thread since the pool of others is not inherited, and return its process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            work(*arguments)
            code = 0
        finally:
            if code:
                traceback.print_exc()
            os._exit(code)
    return child


def run_forked(work: Callable[..., object], *arguments: object) -> int:
    """Call `work` in a fork and return its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(start_fork(work, *arguments), 0)[1])
