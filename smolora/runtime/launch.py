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


def find_meeting_place() -> str:
    """Return where the processes of this run find each other, as address:port.

    Raises:
        ConfigError: The environment doesn't say.
    """
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise ConfigError(
            f"WORLD_SIZE asks for {launched_processes()} processes, and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set, by which they find each other. A batch system may have "
            "left WORLD_SIZE behind: for one process unset it; for several start with torchrun or accelerate launch."
        )
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def asks_to_shard() -> bool:
    """Return whether accelerate's configuration asks for FSDP.

    Raises:
        ConfigError: In its first version, or with a part of it that this loop doesn't do.
    """
    if not is_switched_on("ACCELERATE_USE_FSDP"):
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":  # accelerate's default is 1.
        raise ConfigError(
            f"FSDP_VERSION is {os.environ.get('FSDP_VERSION', 'not set')}, and smolora shards with FSDP2 alone. Write "
            "fsdp_version: 2 under fsdp_config of accelerate's configuration, or set FSDP_VERSION=2 beside "
            "ACCELERATE_USE_FSDP=true."
        )
    for name, advice in _FSDP_UNHEEDED.items():
        if is_switched_on(name):
            raise ConfigError(f"{name} is set, which smolora doesn't do. {advice}")
    return True


def is_switched_on(name: str) -> bool:
    """Whether accelerate set the environment's `name` to a yes."""
    return os.environ.get(name, "false").lower() in ("1", "true")


_FSDP_UNHEEDED = {
    "FSDP_OFFLOAD_PARAMS": "Write fsdp_offload_params: false in accelerate's configuration.",
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "Write fsdp_activation_checkpointing: false in accelerate's configuration, and set "
        "training.gradient_checkpointing=true."
    ),
}
"""What its FSDP can be told beside the version. How layers are found and states are saved has no meaning here."""


def is_main_launched() -> bool:
    """Whether this is the process that writes the records: the first one, or the only one."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"
