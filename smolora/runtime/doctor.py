"""What this machine offers a run, as a list of facts: quick, and with nothing loaded but torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from smolora.runtime.device import resolve_device, resolve_dtype
from smolora.runtime.memory import keep_large_blocks

_REQUIRED = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "pydantic",
)


class Fact(NamedTuple):
    """One line of the report."""

    name: str
    value: str


def examine_machine(folder: Path = Path()) -> list[Fact]:
    """Return what a run would find here: computing, memory, the disk of `folder`, versions and optional parts."""
    device, device_reason = resolve_device("auto")
    dtype, dtype_reason = resolve_dtype("auto", device)
    return [
        Fact("smolora", f"{_version('smolora')} on Python {platform.python_version()}, {platform.platform()}"),
        Fact("device", f"{device} ({device_reason})"),
        Fact("base dtype", f"{str(dtype).removeprefix('torch.')} ({dtype_reason})"),
        Fact("threads", _describe_threads()),
        Fact("allocator", keep_large_blocks()),
        Fact("memory", _describe_memory(device)),
        Fact("disk", f"{_in_gib(shutil.disk_usage(folder).free)} free in {folder.resolve()}"),
        Fact("libraries", ", ".join(f"{name} {_version(name)}" for name in _REQUIRED)),
        *(Fact(f"optional: {extra}", _describe_extra(extra)) for extra in _list_extras()),
    ]


def _describe_threads() -> str:
    chosen = (
        f"OMP_NUM_THREADS={value}" if (value := os.environ.get("OMP_NUM_THREADS")) else "set OMP_NUM_THREADS to change"
    )
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    busy = os.getloadavg()[0] if sys.platform != "win32" else 0.0
    return f"{threads} of {cores} cores ({chosen}){describe_load(threads, cores, busy)}"


def describe_load(threads: int, cores: int, busy: float) -> str:
    """Return a warning where other work keeps so many cores busy that threads must take turns, else nothing.

    >>> describe_load(threads=2, cores=2, busy=0.2)
    ''
    """
    if threads == 1 or threads <= cores - busy + 0.5:
        return ""
    return f"; other work is running (load {busy:.1f}): OMP_NUM_THREADS=1 can be many times faster until it ends"


def _describe_memory(device: torch.device) -> str:
    """Physical memory; a container's limit may be lower."""
    text = "unknown on this system"
    if sys.platform != "win32":
        text = _in_gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        text += f"; {torch.cuda.get_device_name()}: {_in_gib(free)} free of {_in_gib(total)}"
    return text


def _list_extras() -> list[str]:
    return importlib.metadata.metadata("smolora").get_all("Provides-Extra") or []


def _describe_extra(extra: str) -> str:
    marker = f'extra == "{extra}"'
    needed = [line for line in importlib.metadata.requires("smolora") or [] if marker in line.replace("'", '"')]
    names = [re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0] for line in needed]
    missing = [name for name in names if _version(name) is None]
    return f"not installed ({', '.join(missing)}): pip install 'smolora[{extra}]'" if missing else "installed"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _in_gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
