"""Drawing at random without touching the generator that everybody else draws from."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_random_state(device: torch.device, seed: int | None) -> Iterator[None]:
    """Seed `device`'s generator for the block and put its state back afterwards; None takes a seed from the system."""
    on_cpu = device.type == "cpu"
    forked = (
        torch.random.fork_rng([], device_type="cpu")
        if on_cpu
        else torch.random.fork_rng([device], device_type=device.type)
    )
    seed = secrets.randbits(63) if seed is None else seed
    with forked:
        if on_cpu:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every accelerator too.
        else:
            torch.get_device_module(device).manual_seed(seed)
        yield
