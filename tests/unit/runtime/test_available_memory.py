"""What may still be taken is the least of what the system and every control group above the process leave."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from smolora.runtime.available_memory import is_out_of_memory, read_available_memory


@pytest.fixture
def machine(tmp_path):
    """Files as the kernel shows them: 1,000 kB are available; the groups come with each test."""
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:    1000 kB\n")
    return tmp_path


def limit(folder, names, *, limit, used, cache=0):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\ntotal_inactive_file {cache}\n")


V2 = ("memory.max", "memory.current")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def available(machine, groups):
    (machine / "cgroup").write_text(groups)
    return read_available_memory(machine / "meminfo", machine / "cgroup", machine / "sys")


def test_without_a_limit_it_is_what_the_system_has(machine):
    limit(machine / "sys/work", V2, limit="max", used=300_000)
    assert available(machine, "0::/work\n") == 1_024_000


def test_a_group_leaves_its_limit_less_what_it_uses_and_cannot_drop(machine):
    limit(machine / "sys/work", V2, limit=500_000, used=300_000, cache=40_000)
    assert available(machine, "0::/work\n") == 240_000


def test_the_limit_of_a_group_above_counts(machine):
    limit(machine / "sys/work/inner", V2, limit="max", used=0)
    limit(machine / "sys/work", V2, limit=90_000, used=50_000)
    assert available(machine, "0::/work/inner\n") == 40_000


def test_the_older_kind_of_groups_is_read(machine):
    limit(machine / "sys/memory/work", V1, limit=700_000, used=300_000, cache=1)
    assert available(machine, "5:cpu:/work\n4:memory:/work\n0::/\n") == 400_001


def test_a_container_that_sees_its_group_as_the_root_is_limited(machine):
    limit(machine / "sys/memory", V1, limit=70_000, used=30_000)
    assert available(machine, "4:memory:/docker/of/the/host\n") == 40_000


def test_a_group_past_its_limit_leaves_nothing(machine):
    limit(machine / "sys", V2, limit=10_000, used=30_000)
    assert available(machine, "0::/\n") == 0


def test_this_machine_leaves_something():
    assert read_available_memory() > 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_limit_of_addresses_leaves_no_more_than_itself():
    script = "from smolora.runtime.available_memory import read_available_memory; print(read_available_memory())"
    limited = ["bash", "-c", f"ulimit -v 400000; exec {sys.executable} -c '{script}'"]
    left = int(subprocess.run(limited, capture_output=True, text=True, check=True).stdout)
    assert 0 < left < 400_000 * 1024


def test_torch_out_of_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("could not create a primitive"))
    assert not is_out_of_memory(RuntimeError("could not create a primitive descriptor for matmul"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
