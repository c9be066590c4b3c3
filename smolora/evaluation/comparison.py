"""Base against tuned on the same rows, as differences with intervals; and the time that may be spent on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import numpy as np

from smolora.errors import count_of
from smolora.evaluation.bootstrap import find_interval
from smolora.evaluation.metric import Sums, finite
from smolora.models.bundle import ModelBundle

Before = Callable[[ModelBundle], AbstractContextManager[None]]
"""Makes a tuned model, for a while, what it is held against."""

LEAST_LOSS_SHARE = 0.01
"""A loss that differs by less than this share of the base's has not changed, however sure the difference is."""

FEWEST_ANSWERS = 16
"""Answers to fewer rows are shown, and decide nothing."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One number of the base and of the tuned model."""

    name: str
    base: float
    tuned: float
    low: float | None
    high: float | None
    """Bounds of the 95 % interval of the difference, tuned less base."""
    num_rows: int
    variant: str
    version: str

    @property
    def difference(self) -> float:
        """Tuned less base."""
        return self.tuned - self.base

    @property
    def verdict(self) -> Literal[-1, 0, 1]:
        """1 where the tuned model is surely better, -1 where it is surely worse, 0 where that can't be told."""
        if self.low is None or self.high is None:
            return 0
        if self.name == "loss":
            is_small = abs(self.difference) < LEAST_LOSS_SHARE * abs(self.base)
            return 0 if is_small else sign_of(-self.high, -self.low)
        return sign_of(self.low, self.high) if self.is_counted else 0

    @property
    def is_counted(self) -> bool:
        """Whether there are rows enough to decide anything."""
        return self.name == "loss" or self.num_rows >= FEWEST_ANSWERS

    def describe(self) -> str:
        """Return the numbers as a line."""
        bounds = "" if self.low is None else f", 95 % of {self.low:+.4f} to {self.high:+.4f}"
        change = f"{self.difference:+.4f}{bounds}; {count_of(self.num_rows, 'row')}"
        return f"{self.name} {self.base:.4f} -> {self.tuned:.4f} ({change})"

    def to_dict(self) -> dict[str, object]:
        """Return the numbers as plain values; null where one isn't finite."""
        return {
            "name": self.name,
            **{name: finite(value) for name, value in (("base", self.base), ("tuned", self.tuned))},
            "difference": finite(self.difference),
            "low": finite(self.low),
            "high": finite(self.high),
            "num_rows": self.num_rows,
            "variant": self.variant,
            "version": self.version,
        }


def sign_of(low: float, high: float) -> Literal[-1, 0, 1]:
    """Return the sign that all of an interval has; 0 where it has two, or is one point at 0."""
    return 1 if low > 0 else -1 if high < 0 else 0


def bound_differences(before: Sums, after: Sums, *, num_rows: int) -> tuple[float | None, float | None]:
    """Return the interval of resampled differences; of one row there is none."""
    with np.errstate(invalid="ignore"):
        return find_interval(after - before, num_rows=num_rows) or (None, None)


class Budget:
    """Seconds that may be spent, from now on."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._started = time.perf_counter()

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._started

    @property
    def left(self) -> float:
        """Seconds that may still be spent; below 0 where too many were."""
        return self.seconds - self.spent
