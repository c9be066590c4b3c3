"""Device and number type are chosen with a reason, and what isn't there is refused with what is."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import torch

from smolora.errors import ConfigError
from smolora.runtime.device import (
    DeviceManager,
    has_intel_processor,
    has_native_bfloat16,
    resolve_device,
    resolve_dtype,
)

CPU = torch.device("cpu")


def test_auto_takes_a_device_of_this_machine_and_says_why():
    device, reason = resolve_device()
    assert device.type in reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has cuda")
def test_an_absent_device_is_refused_with_what_is_here():
    with pytest.raises(ConfigError, match=r"'cuda' isn't on this machine. Here: .*cpu"):
        resolve_device("cuda")


def test_a_frozen_base_is_bfloat16_exactly_where_the_cpu_computes_it():
    dtype, reason = resolve_dtype("auto", CPU)
    assert (dtype is torch.bfloat16) == has_native_bfloat16(CPU)
    assert "bfloat16" in reason


def test_an_asked_type_is_taken():
    assert resolve_dtype("float32", CPU).dtype is torch.float32


def test_a_model_is_moved_and_keeps_its_type():
    model = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    moved = DeviceManager("cpu").optimize_for_device(model)
    assert moved.weight.dtype is torch.bfloat16
    assert moved.weight.device.type == "cpu"


@pytest.mark.gpu
def test_a_frozen_base_is_bfloat16_on_a_gpu_that_has_it():
    device = resolve_device("cuda").device
    assert (resolve_dtype("auto", device).dtype is torch.bfloat16) == has_native_bfloat16(device)


@pytest.mark.skipif(shutil.which("lscpu") is None, reason="the system has no lscpu, which says whose the processor is")
def test_whose_the_processor_is_is_what_the_system_says():
    said = subprocess.run(["lscpu"], check=True, capture_output=True, text=True).stdout
    assert has_intel_processor() == ("GenuineIntel" in said)
