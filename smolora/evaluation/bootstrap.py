"""Intervals by resampling rows, one row at a time: memory is the number of resamplings, whatever the number of rows.

The Poisson bootstrap: in each resampling a row counts as often as a Poisson number of mean 1 says, which is the usual
bootstrap but for the size of a resampling, and that is near the number of rows. The numbers are a function of (seed,
row), so a resumed evaluation has the same ones, and two models on the same rows are resampled alike.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from smolora.evaluation.metric import Sums
from smolora.runtime.student import t_quantile

NUM_RESAMPLINGS = 1000
CONFIDENCE = 0.95

_MANY_ROWS = 1000
"""From here on an interval is widened by .2 %, as it is here; the exact quantile takes time by the row."""


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


def find_interval(values: npt.NDArray[np.float64], *, num_rows: int) -> tuple[float, float] | None:
    """Return the 95 % interval by the values of resampled rows; None of one row, or where under half are numbers.

    What holds the middle 95 % of them is too narrow for few rows: of two normal differences it holds the mean half of
    the time. So it is widened about its middle by t / z, and by sqrt(n / (n - 1)) as resampled rows vary less than new
    ones do (Hesterberg 2015, What teachers should know about the bootstrap). Skewed rows, exponential ones, then are
    held 88 % of the time by 2 of them and 93 % by 30.
    """
    finite = values[np.isfinite(values)]
    if num_rows < 2 or len(finite) < len(values) / 2:
        return None
    above = (1 + CONFIDENCE) / 2
    low, high = np.quantile(finite, [1 - above, above])
    n = min(num_rows, _MANY_ROWS)
    widening = t_quantile(above, n - 1) / NormalDist().inv_cdf(above) * math.sqrt(n / (n - 1))
    middle, reach = (low + high) / 2, widening * (high - low) / 2
    return float(middle - reach), float(middle + reach)
