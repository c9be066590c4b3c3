"""Memory is reported in bytes, and the allocator is told to keep large blocks where it is glibc's."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from smolora.runtime.memory import MemoryManager, keep_large_blocks, page_out, return_large_blocks
from tests.resident import resident_bytes

FAULTS = """
import os, resource, torch
from smolora.runtime.memory import keep_large_blocks, return_large_blocks

def step(): torch.empty(9 << 20).fill_(1.0)  # 36 MiB: glibc keeps blocks up to 32 by itself, once it has seen one.

def count(*told):
    if os.fork():
        assert os.wait()[1] == 0
        return
    for tell in told: tell()
    for _ in range(20): step()  # The heap grows until it holds an aligned block.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10): step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, flush=True)
    os._exit(0)

torch.set_num_threads(1)
count()
count(keep_large_blocks)
count(keep_large_blocks, return_large_blocks)
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this system's allocator is not glibc's")
def test_large_blocks_are_not_mapped_anew_at_every_step():
    # In children of one process that has imported torch, so that each has an allocator that was told nothing.
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    untold, kept, returned = map(int, done.stdout.split())
    assert kept < untold / 10
    assert kept < returned / 10


def test_the_allocator_says_what_was_done():
    assert keep_large_blocks()
    assert return_large_blocks()
    assert keep_large_blocks()  # As the other tests have it.


def test_usage_counts_what_a_tensor_takes():
    # In a process of its own: another test may have left free memory that a new tensor moves into.
    done = subprocess.run([sys.executable, "-c", USAGE], capture_output=True, text=True, check=True)
    grown, below_peak, device = map(int, done.stdout.split())
    assert grown > 100 << 20
    assert below_peak <= 16 << 20
    assert device == 0


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere pages are left to the system")
def test_a_mapped_weight_leaves_memory_and_its_values_stay(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"weight": torch.arange(1 << 18)}, file)
    weight = load_file(file)["weight"]
    total = weight.sum()
    assert resident_bytes(file) >= weight.nbytes
    page_out(weight)
    assert resident_bytes(file) < weight.nbytes / 10
    assert weight.sum() == total


def test_clearing_the_cache_of_a_cpu_does_nothing():
    MemoryManager("cpu").clear_cache()


CHILD = """
import subprocess, sys
block = bytearray(b"x") * (512 << 20)
code = "from smolora.runtime.memory import MemoryManager; print(MemoryManager().get_memory_usage().process_peak)"
print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process starts with a peak of its own")
def test_the_peak_is_not_that_of_the_process_that_started_this_one():
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 500 << 20


@pytest.mark.parametrize(
    ("rows", "accumulation", "available", "expected"),
    [
        (8, 1, 1000, (8, 1)),
        (8, 1, 220, (4, 2)),
        (8, 2, 130, (1, 16)),
        (6, 2, 200, (3, 4)),
        (12, 1, 229, (4, 3)),
        (8, 1, 129, None),
    ],
)
def test_passes_are_split_to_fit_and_an_update_sees_as_many_rows(rows, accumulation, available, expected):
    found = MemoryManager().optimize_batch_size(lambda n: 100 + 30 * n, rows, accumulation, available=available)
    assert found == expected
    assert found is None or found[0] * found[1] == rows * accumulation


def test_splitting_measures_few_sizes_and_each_once():
    asked = []
    MemoryManager().optimize_batch_size(lambda rows: asked.append(rows) or rows, 64, available=16)
    assert len(asked) == len(set(asked)) <= 3


def test_what_may_be_taken_now_is_the_limit_where_none_is_given():
    memory = MemoryManager()
    assert memory.get_available_memory() > 0
    assert memory.optimize_batch_size(lambda rows: rows, 8) == (8, 1)
    assert memory.optimize_batch_size(lambda rows: rows << 60, 8) is None
