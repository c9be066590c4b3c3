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


def t_quantile(probability: float, degrees: int) -> float:
    """Return the point that Student's t is below with `probability`, at least a half.

    >>> round(t_quantile(0.975, 4), 3)
    2.776
    """
    low, high = 0.0, 1.0
    while _t_below(high, degrees) < probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_below(middle, degrees) < probability else (low, middle)
    return high


def _t_below(t: float, degrees: int) -> float:
    """Return P(T < t) for t >= 0 by the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan2(t, math.sqrt(degrees))
    cosine = math.cos(angle)
    term = cosine if degrees % 2 else 1.0
    total = 0.0
    for k in range(2 + degrees % 2, degrees + 1, 2):
        total += term
        term *= cosine * cosine * (k - 1) / k
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if degrees % 2 else math.sin(angle) * total
    return (1 + inside) / 2
