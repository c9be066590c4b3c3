"""From raw text to a small language model you can trust, on the machine you have.

Names are imported when they are first used: `import smolora` takes milliseconds and loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smolora.adapters.attach import PEFTModelWrapper as PEFTModelWrapper

__version__ = "0.1.0"

_HOMES = {
    "SmoLoRA": "smolora.api",
}
"""Public name to the module that defines it."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'smolora' has no attribute '{name}'")
    return importlib.import_module(_HOMES[name]).__dict__[name]


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
