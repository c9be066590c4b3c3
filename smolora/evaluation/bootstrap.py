"""Intervals by resampling rows, one row at a time: memory is the number of resamplings, whatever the number of rows.

The Poisson bootstrap: in each resampling a row counts as often as a Poisson number of mean 1 says, which is the usual
bootstrap but for the size of a resampling, and that is near the number of rows. The numbers are a function of (seed,
row), so a resumed evaluation has the same ones, and two models on the same rows are resampled alike.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from smolora.evaluation.metric import Sums

NUM_RESAMPLINGS = 1000
CONFIDENCE = 0.95


class Tally:
    """Sums over rows, and the same sums over resampled rows."""

    def __init__(self, width: int, *, seed: int = 0) -> None:
        self.num_rows = 0
        self.sums: Sums = np.zeros(width)
        self.resampled: Sums = np.zeros((NUM_RESAMPLINGS, width))
        self.num_resampled: Sums = np.zeros(NUM_RESAMPLINGS)
        """Rows in each resampling; of a few rows some have none, and no metric has a value there."""
        self._seed = seed

    def add(self, measured: Sums) -> None:
        """Take in what one row adds, [width]."""
        weights = np.random.default_rng((self._seed, self.num_rows)).poisson(1.0, len(self.resampled))
        self.num_rows += 1
        self.sums += measured
        self.resampled += weights[:, None] * measured
        self.num_resampled += weights


def find_interval(values: npt.NDArray[np.float64]) -> tuple[float, float] | None:
    """Return what holds the middle 95 % of resampled values; None where fewer than half of them are numbers."""
    finite = values[np.isfinite(values)]
    if len(finite) < len(values) / 2:
        return None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(finite, [tail, 1 - tail])
    return float(low), float(high)
