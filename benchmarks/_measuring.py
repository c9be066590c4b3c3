"""What the benchmarks share: timing with a warm-up, medians, a table, the machine, and where the real data is."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def time_steps(step: Callable[[], object], *, num_warmup: int, num_steps: int) -> list[float]:
    """Return the seconds of each call of `step` after the warm-up."""
    seconds = []
    for _ in range(num_warmup + num_steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return seconds[num_warmup:]


def find_shared(name: str) -> Path:
    """Return a file of the real data, which a clone alone doesn't have; exit with a clear word where it is missing."""
    path = Path(os.environ.get("SMOLORA_SHARED", ROOT.parent / "shared")) / name
    if not path.is_file():
        sys.exit(f"skipped: no {path}. Set SMOLORA_SHARED to the folder that holds {name}.")
    return path


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print aligned columns under a line about the machine."""
    cells = [list(header), *([_format(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    print(f"\n{title}\n{describe_machine()}")
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def describe_machine() -> str:
    """Return processor, threads, torch and how busy the machine is: figures from a busy one say little."""
    busy = f", load {os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else ""
    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}{busy}"


def median(values: Sequence[float]) -> float:
    """Return the middle value."""
    return statistics.median(values)


def _format(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
