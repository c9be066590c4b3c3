"""How much memory a process may still take, what fits, and how to tell that there was too little.

Nothing here imports torch: what asks from outside of a run must not take the run's memory.
"""

from __future__ import annotations

import bisect
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

_MEMINFO, _CGROUPS, _CGROUP_ROOT = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_STATM = Path("/proc/self/statm")

_TORCH_SAYS = re.compile("out of memory|can't allocate memory|could not create a primitive$")
"""The last is oneDNN's, which names no reason: it makes one only of shapes that it has said it can compute."""


def read_available_memory(
    meminfo: Path = _MEMINFO, cgroups: Path = _CGROUPS, cgroup_root: Path = _CGROUP_ROOT
) -> int | None:
    """Return the bytes that may still be taken, the least of what the system and all limits leave; None if unknown.

    Without /proc it is all of the machine's memory, which is too much.
    """
    left = [*_read_meminfo(meminfo), *_read_cgroups(cgroups, cgroup_root), *_read_address_limit()]
    if left:
        return max(0, min(left))
    return None if sys.platform == "win32" else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def split_update(
    measure: Callable[[int], int], rows: int, accumulation: int, *, available: int | None
) -> tuple[int, int] | None:
    """Return the most rows a pass that fit, and its passes; see `MemoryManager.optimize_batch_size`."""
    if available is None:
        return rows, accumulation
    divisors = [size for size in range(1, rows + 1) if rows * accumulation % size == 0]
    fitting = bisect.bisect_right(divisors, available, key=measure)
    return (divisors[fitting - 1], rows * accumulation // divisors[fitting - 1]) if fitting else None


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: Python says it by a class, torch by a RuntimeError whose wording differs by device."""
    said = str(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_TORCH_SAYS.search(said)))


def _read_meminfo(file: Path) -> Iterator[int]:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", file.read_text(encoding="ascii"), re.M) if file.is_file() else None
    if found:
        yield int(found[1]) * 1024


def _read_address_limit() -> Iterator[int]:
    """Yield what `ulimit -v` leaves of addresses, where it is set: each byte of memory takes one."""
    if not _STATM.is_file():
        return
    import resource  # Windows has none.

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        yield limit - int(_STATM.read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _read_cgroups(cgroups: Path, root: Path) -> Iterator[int]:
    """Yield what is left of every limit above this process. A container often sees its own group as the root."""
    lines = cgroups.read_text(encoding="utf-8").splitlines() if cgroups.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            names, mount = ("memory.max", "memory.current", "inactive_file"), root
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            mount = root / "memory"
        else:
            continue
        folder = mount / path.lstrip("/")
        for group in (folder, *folder.parents):
            yield from _read_limit(group, *names)
            if group == mount:
                break


def _read_limit(group: Path, limit: str, usage: str, reclaimable: str) -> Iterator[int]:
    if not (group / limit).is_file() or (text := (group / limit).read_text().strip()) == "max":
        return
    found = re.search(rf"^{reclaimable} (\d+)", (group / "memory.stat").read_text(), re.M)
    cache = int(found[1]) if found else 0  # Pages of files not read lately, which the kernel gives up first.
    yield int(text) - int((group / usage).read_text()) + cache
