"""Drawing at random without touching the generator that everybody else draws from."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_random_state(device: torch.device, seed: int | None) -> Iterator[None]:
    """Seed `device`'s generator for the block and put its state back afterwards; None takes a seed from the system."""
    forked = [device] if device.type == "cuda" else []
    mps_state = torch.mps.get_rng_state() if device.type == "mps" else None  # fork_rng can't fork mps.
    with torch.random.fork_rng(forked, device_type="cuda"):
        _seed_generator(device, secrets.randbits(63) if seed is None else seed)
        try:
            yield
        finally:
            if mps_state is not None:
                torch.mps.set_rng_state(mps_state)


def _seed_generator(device: torch.device, seed: int) -> None:
    """Seed one device; torch.manual_seed would seed all of them, and their states would be lost."""
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
