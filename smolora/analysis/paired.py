"""Whether one configuration is better than another: the mean difference over the same seeds, and its interval.

The interval is Student's t over the differences of the pairs, which is exact for normal differences and needs no other
assumption about the runs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from smolora.runtime.student import t_quantile

Verdict = Literal["better", "worse", "no difference"]


@dataclass(frozen=True)
class PairedDifference:
    """Losses of one configuration less those of another, over the same seeds."""

    differences: tuple[float, ...]
    mean: float
    low: float
    high: float
    verdict: Verdict
    """better where the whole interval is below 0, worse where it is above. Else no difference was shown."""


def compare_pairs(losses: Sequence[float], against: Sequence[float], *, confidence: float) -> PairedDifference:
    """Return the difference of two rows of losses, a pair for each seed.

    >>> compare_pairs([1.0, 1.1, 1.2], [2.0, 2.2, 2.1], confidence=0.95).verdict
    'better'
    """
    differences = tuple(loss - other for loss, other in zip(losses, against, strict=True))
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    reach = t_quantile((1 + confidence) / 2, len(differences) - 1) * error
    low, high = mean - reach, mean + reach
    verdict: Verdict = "better" if high < 0 else "worse" if low > 0 else "no difference"
    return PairedDifference(differences, mean, low, high, verdict)
