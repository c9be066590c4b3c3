"""What torchrun and `accelerate launch` tell a process of its run, through the environment. No torch is imported."""

from __future__ import annotations

import os

from smolora.errors import ConfigError


def launched_processes() -> int:
    """Return how many processes the launcher started for this run; 1 without a launcher.

    Raises:
        ConfigError: WORLD_SIZE is no number of processes, or accelerate was asked for several and started one.
    """
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ:
        # So does --cpu, and distributed_type: MULTI_CPU; for one process it sets no MASTER_PORT (accelerate 1.15).
        raise ConfigError(
            "accelerate launch was asked for several processes and started only one. On CPUs give it --multi_gpu "
            "without --cpu, which takes CPUs where there is no GPU, or start with torchrun."
        )
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"WORLD_SIZE must be a number of processes, found {text!r}. torchrun sets it; else unset it.")
    return int(text)


def is_main_launched() -> bool:
    """Whether this is the process that writes the records: the first one, or the only one."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"
