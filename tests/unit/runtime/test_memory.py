"""Memory is reported in bytes, and the allocator is told to keep large blocks where it is glibc's."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from smolora.runtime.memory import MemoryManager, keep_large_blocks

FAULTS = """
import resource, torch
from smolora.runtime.memory import keep_large_blocks
if {keep}: keep_large_blocks()
torch.set_num_threads(1)
def step(): torch.empty(16 << 20).fill_(1.0)
for _ in range(30): step()  # The heap grows until it holds an aligned block.
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10): step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


USAGE = """
import torch
from smolora.runtime.memory import MemoryManager
manager = MemoryManager()
before = manager.get_memory_usage().process
block = torch.ones(32 << 20)  # 128 MiB
usage = manager.get_memory_usage()
print(usage.process - before, usage.process - usage.process_peak, usage.device + usage.device_peak)
"""


def page_faults(*, keep: bool) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this system's allocator is not glibc's")
def test_large_blocks_are_not_mapped_anew_at_every_step():
    assert page_faults(keep=True) < page_faults(keep=False) / 10


def test_the_allocator_says_what_was_done():
    assert keep_large_blocks()


def test_usage_counts_what_a_tensor_takes():
    # In a process of its own: another test may have left free memory that a new tensor moves into.
    done = subprocess.run([sys.executable, "-c", USAGE], capture_output=True, text=True, check=True)
    grown, below_peak, device = map(int, done.stdout.split())
    assert grown > 100 << 20
    assert below_peak <= 16 << 20
    assert device == 0


def test_clearing_the_cache_of_a_cpu_does_nothing():
    MemoryManager("cpu").clear_cache()
