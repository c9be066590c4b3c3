"""What stands out in a run's curves, by rules that fit in a sentence: spikes, stalls, shares of the gradient."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smolora.analysis.phases import steps_within
from smolora.analysis.run_record import Array, PhaseSpan, has_number

FEWEST_STEPS = 5
"""Below so many logged steps nothing is said about where a run learned, stalled or spiked."""

SPIKE_RULE = (
    "A spike is at least 1.5 times the median of up to 10 logged values before it, and more than 6 robust "
    "standard deviations above it (1.4826 x the median absolute deviation, on the logarithm)."
)
STALL_RULE = (
    "A stall is a fifth of the logged steps or more (10 at least) in which the training loss, as the median of up to "
    "10 logged values, reached no new low by 1 %."
)

_WINDOW = 10
_SPIKE_DEVIATIONS = 6.0
_SPIKE_RATIO = 1.5
_STALL_FALL = 0.01
_STALL_SHARE = 0.2


@dataclass(frozen=True)
class Spike:
    """Logged steps without a gap between them that stand far above what came before."""

    first: int
    last: int
    ratio: float
    """The highest value over the median before it."""


@dataclass(frozen=True)
class Stall:
    """An interval of steps in which the loss reached no new low."""

    first: int
    last: int


def find_lowest(steps: Array, values: Array) -> tuple[float, float] | None:
    """Return the step of the lowest value, and the value."""
    if not has_number(values):
        return None
    index = int(np.nanargmin(values))
    return float(steps[index]), float(values[index])


def find_spikes(steps: Array, values: Array, phases: list[PhaseSpan]) -> list[Spike]:
    """Return where `values` jumped, by SPIKE_RULE; each phase by its own values, as its norms have a level."""
    known = np.isfinite(values) & (values > 0)
    steps, logs = steps[known], np.log(values[known])
    parts = [steps_within(steps, phase) for phase in phases] or [np.full(len(steps), True)]
    return [spike for part in parts for spike in _find_spikes_within(steps[part], logs[part])]


def _find_spikes_within(steps: Array, logs: Array) -> list[Spike]:
    if len(logs) <= FEWEST_STEPS:
        return []
    before = [np.median(logs[max(0, index - _WINDOW) : index]) for index in range(FEWEST_STEPS, len(logs))]
    rises = np.full(len(logs), -np.inf)
    rises[FEWEST_STEPS:] = logs[FEWEST_STEPS:] - before
    known = rises[FEWEST_STEPS:]
    deviation = 1.4826 * np.median(np.abs(known - np.median(known)))
    threshold = max(np.log(_SPIKE_RATIO), _SPIKE_DEVIATIONS * deviation)
    spikes = []
    for members in _split_at_gaps(np.flatnonzero(rises > threshold)):
        height = float(np.exp(rises[members].max()))
        spikes.append(Spike(int(steps[members[0]]), int(steps[members[-1]]), height))
    return spikes


def _split_at_gaps(indices: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    parts = np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1)
    return [part for part in parts if len(part)]


def find_stalls(steps: Array, losses: Array) -> list[Stall]:
    """Return the intervals by STALL_RULE."""
    finite = np.isfinite(losses)
    steps, losses = steps[finite], losses[finite]
    shortest = max(_WINDOW, int(np.ceil(_STALL_SHARE * len(losses))))
    lows, lowest = [0], np.inf
    for index in range(len(losses)):
        smooth = float(np.median(losses[max(0, index + 1 - _WINDOW) : index + 1]))
        if smooth < lowest * (1 - _STALL_FALL) or index == 0:
            lowest = smooth
            lows.append(index)
    pairs = zip(lows, [*lows[1:], len(losses)], strict=True)
    return [Stall(int(steps[low]), int(steps[next_low - 1])) for low, next_low in pairs if next_low - low > shortest]


def measure_shares(norms: Array) -> Array:
    """Return each row's share of the squared norm [rows, steps]: 0 where frozen, NaN at a step without any."""
    squares = np.square(np.nan_to_num(norms))
    total = squares.sum(axis=0)
    return squares / np.where(total > 0, total, np.nan)


def mean_shares(shares: Array) -> Array:
    """Return the mean share of each row [rows], every step counting alike however large its gradient; 0 where none."""
    known = shares[:, np.isfinite(shares).all(axis=0)]
    mean: Array = known.mean(axis=1) if known.shape[1] else np.zeros(len(shares))
    return mean


def layer_totals(layers: dict[str, Array]) -> Array:
    """Return the norm of each layer over its groups [layers, steps], NaN where all of it was frozen."""
    squares = np.stack([np.square(matrix) for matrix in layers.values()])
    frozen = np.isnan(squares).all(axis=0)
    return np.where(frozen, np.nan, np.sqrt(np.nansum(squares, axis=0)))
