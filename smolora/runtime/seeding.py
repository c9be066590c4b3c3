"""Random numbers as a pure function of what they are for: (seed, purpose, step), never of what was drawn before."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derive_seed(seed: int, *purpose: int | str) -> int:
    """Return a 63-bit seed for one purpose, such as `derive_seed(seed, "order", epoch)`; the same everywhere."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def permutation(length: int, seed: int, *purpose: int | str) -> np.ndarray:
    """Return the numbers below `length` in a seeded order."""
    return np.random.default_rng(derive_seed(seed, *purpose)).permutation(length)


def seed_noise(seed: int, *purpose: int | str) -> None:
    """Seed the generators that dropout draws from, on every device.

    Called at the start of each step, it makes a resumed run draw the same noise with no generator state on disk.
    """
    number = derive_seed(seed, *purpose)
    if torch.accelerator.is_available():
        torch.manual_seed(number)
    else:
        # The same bits: for each kind of device that isn't there, manual_seed keeps a traceback, .4 ms of every step.
        torch.default_generator.manual_seed(number)
