"""Prints the most memory without mapped files that another process had, in bytes; it looks every millisecond.

python benchmarks/_memory.py PID    # until its standard input ends
"""

from __future__ import annotations

import select
import sys
from pathlib import Path


def read_status(process: str = "self") -> dict[str, int]:
    """Return a process's memory by Linux's account, in bytes; elsewhere 0."""
    status = Path("/proc", process, "status")
    fields = status.read_text(encoding="ascii").splitlines() if status.exists() else []
    sizes = dict(line.split(":") for line in fields if line.endswith("kB"))
    return {name: int(sizes.get(name, "0 kB").split()[0]) * 1024 for name in ("VmHWM", "VmRSS", "RssAnon")}


def main(process: str) -> None:
    """Say once that it begins, then the most that was seen."""
    most = read_status(process)["RssAnon"]
    print("watching", flush=True)
    while not select.select([sys.stdin], [], [], 1e-3)[0]:
        most = max(most, read_status(process)["RssAnon"])
    print(most)


if __name__ == "__main__":
    main(sys.argv[1])
