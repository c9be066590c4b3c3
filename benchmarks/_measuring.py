"""What the benchmarks share: timing with a warm-up, medians, a table, the machine, and where the real data is."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from _memory import read_status

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def time_steps(step: Callable[[], object], *, num_warmup: int, num_steps: int) -> list[float]:
    """Return the seconds of each call of `step` after the warm-up."""
    seconds = []
    for _ in range(num_warmup + num_steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return seconds[num_warmup:]


class Cost(NamedTuple):
    """What one call took in a process of its own."""

    seconds: float
    cpu_seconds: float
    """Of all threads: on a busy machine it says more than the time on the wall."""
    peak_bytes: int
    """Resident memory at the peak, above what it was before the call; files that are mapped count as they are read."""
    peak_anonymous_bytes: int
    """The same without mapped files, which the system may drop at any time; sampled every millisecond."""


def measure_call(call: Callable[[], object]) -> Cost:
    """Call once and return what it took. Memory is Linux's account; elsewhere it is 0."""
    with _watched_memory() as watcher:
        before = read_status()
        started, cpu = time.perf_counter(), time.process_time()
        call()
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
        most_anonymous = int(watcher.communicate()[0])
    return Cost(seconds, cpu_seconds, read_status()["VmHWM"] - before["VmRSS"], most_anonymous - before["RssAnon"])


@contextmanager
def _watched_memory() -> Iterator[subprocess.Popen[str]]:
    """Start `_memory.py` on this process: a thread would hold up the Python code that is measured by a fifth."""
    command = [sys.executable, "-S", str(HERE / "_memory.py"), str(os.getpid())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None
        watcher.stdout.readline()
        yield watcher


def measure_in_turns(script: str, names: Sequence[str], arguments: Sequence[str], rounds: int) -> dict[str, list[Cost]]:
    """Run `script --child NAME` for every name, round after round; each prints its Cost as JSON in its last line."""
    costs: dict[str, list[Cost]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            command = [sys.executable, str(Path(script).resolve()), "--child", name, *arguments]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            costs[name].append(Cost(*json.loads(output.splitlines()[-1])))
    return costs


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
    """Return processor, threads, torch, and how busy the machine is: figures from a busy one say little."""
    processor = f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"
    busy = f", load {os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else ""
    return f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}{busy}"


def median(values: Sequence[float]) -> float:
    """Return the middle value."""
    return statistics.median(values)


def _format(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
