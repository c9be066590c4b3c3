"""Memory of the process and of the device, and an allocator that keeps large blocks instead of mapping them anew."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from smolora.runtime.available_memory import read_available_memory, split_update

logger = logging.getLogger(__name__)

# malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8
_TRIM_BYTES = 2**31 - 1
_RETURNED_BYTES, _MOST_MAPPINGS = 2**20, 2**15
"""Blocks from this size on go back at once, as long as there are fewer of them than half of Linux's limit."""

_MADV_PAGEOUT = 21
"""mman.h of Linux 5.4 and newer; older kernels refuse it and nothing happens."""


def keep_large_blocks() -> str:
    """Stop glibc from mapping and unmapping every large tensor at every step; return what was done.

    By default blocks above a threshold of at most 32 MiB come from mmap and go back at once, so each step pays for
    fresh zeroed pages. Measured by benchmarks/allocator.py. All threads share what is kept: a thread with blocks of its
    own, as glibc has it, took 250 MiB more to check a merge at 135M.
    """
    if platform.libc_ver()[0] != "glibc":
        return f"left as it is: {sys.platform} has no glibc"
    libc = ctypes.CDLL(None)
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _TRIM_BYTES))
    done = all(libc.mallopt(option, value) for option, value in settings)
    return "large blocks are kept between steps" if done else "glibc refused mallopt; left as it is"


def return_large_blocks() -> str:
    """Let glibc give every large tensor back to the machine where it ends; return what was done.

    The other way round than `keep_large_blocks`, for runs that go through many large blocks and must not keep them.
    """
    if platform.libc_ver()[0] != "glibc":
        return f"left as it is: {sys.platform} has no glibc"
    libc = ctypes.CDLL(None)
    done = libc.mallopt(_M_MMAP_MAX, _MOST_MAPPINGS) and libc.mallopt(_M_MMAP_THRESHOLD, _RETURNED_BYTES)
    return "large blocks are given back at once" if done else "glibc refused mallopt; left as it is"


def return_freed_blocks() -> None:
    """Give the machine what has ended but was kept for later, as `keep_large_blocks` has it; glibc only."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def page_out(tensor: torch.Tensor) -> None:
    """Ask the kernel to take the tensor's pages out of memory until they are read again; its values stay.

    For weights mapped from a file that have been copied into another layout: they would count twice. Linux only.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu":
        return
    page = os.sysconf("SC_PAGE_SIZE")
    start = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    if end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_PAGEOUT)


class MemoryUsage(NamedTuple):
    """Bytes in use now and at the peak."""

    process: int
    process_peak: int
    device: int
    device_peak: int


class MemoryManager:
    """What the process and its device hold."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def clear_cache(self) -> None:
        """Give cached device memory back; on a CPU there is none."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.device.type == "mps":
            torch.mps.empty_cache()

    def get_memory_usage(self) -> MemoryUsage:
        """Return bytes of this process and of its device (0 on a CPU)."""
        current, peak = 0, 0
        if self.device.type == "cuda":
            current, peak = torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)
        elif self.device.type == "mps":
            current = peak = torch.mps.current_allocated_memory()
        return MemoryUsage(_resident_bytes(), _peak_resident_bytes(), current, peak)

    def get_available_memory(self) -> int | None:
        """Return the bytes that may still be taken: of the GPU, else of this machine and container; None if unknown."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        return read_available_memory()

    def optimize_batch_size(
        self, measure: Callable[[int], int], rows: int, accumulation: int = 1, *, available: int | None = None
    ) -> tuple[int, int] | None:
        """Split an update into passes that fit in memory; an update sees as many rows as before.

        Args:
            measure: Returns the bytes that a pass of so many rows takes at its peak; more rows never take less.
            rows: Rows in one pass, as asked for.
            accumulation: Passes summed into one update, as asked for.
            available: Bytes to fit into. Left out, what may be taken now.

        Returns:
            The most rows a pass that fit, at most `rows`, and the passes, whose product is `rows * accumulation`.
            None where a single row is too much.

        Example:
            >>> MemoryManager().optimize_batch_size(lambda rows: 100 + 30 * rows, 8, available=250)
            (4, 2)
        """
        limit = self.get_available_memory() if available is None else available
        return split_update(measure, rows, accumulation, available=limit)


def _resident_bytes() -> int:
    if not os.path.exists("/proc/self/statm"):  # noqa: PTH110 - one word on a kernel file
        return _peak_resident_bytes()
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak_resident_bytes() -> int:
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"), re.M) if status.is_file() else None
    if found:  # Not getrusage's: that starts at what the process that started this one held.
        return int(found[1]) * 1024
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
