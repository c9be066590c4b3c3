"""Tells when a number has stopped falling, and remembers how far it has come to that through a resume."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from smolora.config.phases import PlateauConfig


@dataclass
class PlateauDetector:
    """Counts measurements without improvement."""

    best: float | None = None
    without_improvement: int = 0

    def is_reached(self, value: float, config: PlateauConfig) -> bool:
        """Take one measurement; say whether it is the last one that patience allows."""
        improved = math.isfinite(value) and (self.best is None or value < self.best - config.threshold)
        self.best = value if improved else self.best
        self.without_improvement = 0 if improved else self.without_improvement + 1
        return self.without_improvement >= config.patience

    def to_state(self) -> dict[str, float | int | None]:
        """Return what a checkpoint keeps."""
        return {"best": self.best, "without_improvement": self.without_improvement}

    @classmethod
    def from_state(cls, state: Mapping[str, float | int | None]) -> PlateauDetector:
        """Return the detector that `to_state` described."""
        return cls(state["best"], int(state["without_improvement"] or 0))
