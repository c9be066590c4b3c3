"""Which device and which number type a run computes with, and why."""

from __future__ import annotations

import platform
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from smolora.errors import ConfigError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class DeviceChoice(NamedTuple):
    """A device and the reason for it."""

    device: torch.device
    reason: str


class DTypeChoice(NamedTuple):
    """A number type and the reason for it."""

    dtype: torch.dtype
    reason: str


def resolve_device(name: str = "auto") -> DeviceChoice:
    """Return the device that `name` asks for; auto takes cuda, then mps, then cpu.

    Raises:
        ConfigError: The device isn't on this machine, with what is.
    """
    present = _present_devices()
    if name == "auto":
        return DeviceChoice(torch.device(present[0]), f"{present[0]} is the fastest of {', '.join(present)} here")
    if name not in present:
        raise ConfigError(f"device: '{name}' isn't on this machine. Here: {', '.join(present)}.")
    return DeviceChoice(torch.device(name), "as asked")


def resolve_dtype(name: str, device: torch.device) -> DTypeChoice:
    """Return the type of a frozen base's weights.

    auto is bfloat16 for a frozen base where the device multiplies it natively, else float32: elsewhere bfloat16 is
    emulated and slower.
    """
    if name != "auto":
        return DTypeChoice(_DTYPES[name], "as asked")
    if has_native_bfloat16(device):
        return DTypeChoice(torch.bfloat16, f"{device.type} computes bfloat16 natively and the base is frozen")
    return DTypeChoice(torch.float32, f"{device.type} has no native bfloat16")


@cache
def has_intel_processor() -> bool:
    """Whether the processor is Intel's; False where the system doesn't say."""
    try:
        said = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else platform.processor()
    except OSError:
        return False
    return "GenuineIntel" in said


def has_native_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 run on hardware made for them."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "mps":
        return False  # It works from macOS 14 on, but slower than float32 on the first chips.
    features = torch.cpu.get_capabilities()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16") or features.get("bf16"))


def has_matrix_units() -> bool:
    """Whether the processor has units of their own for products of matrices in bfloat16 (Intel's AMX)."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def _present_devices() -> list[str]:
    present = ["cuda"] if torch.cuda.is_available() else []
    present += ["mps"] if torch.backends.mps.is_available() else []
    return [*present, "cpu"]


class DeviceManager:
    """The machine's device, chosen once, and how a model is put on it."""

    def __init__(self, device: str = "auto") -> None:
        self.device, self.reason = resolve_device(device)

    def get_optimal_device(self) -> torch.device:
        """Return cuda, mps or cpu, whichever this machine has first."""
        return self.device

    def optimize_for_device(self, model: torch.nn.Module) -> torch.nn.Module:
        """Move `model` to the device, in place; weights keep their type, so results change by no more than rounding."""
        return model.to(self.device)
