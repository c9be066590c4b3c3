"""What a metric is. Most are sums over rows and a formula on the sums, so that memory doesn't grow with the rows."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from smolora.data.benchmark_rows import BenchmarkRow

Sums = npt.NDArray[np.float64]


def finite(value: float | None) -> float | None:
    """Return a number that JSON can hold, else None."""
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model or another system answered to a row."""

    text: str
    label: str | None = None
    """The likeliest of the labels, where likelihoods were asked for."""
    loss_sum: float | None = None
    """Sum of -log p over the tokens of the references, in nats; None where no model was at hand."""
    num_tokens: int = 0
    """Tokens of the references, each with its end token; or what else the loss is a sum over."""
    labels: tuple[str, ...] = ()
    """Of words: the label of each, empty where it has none."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What some metrics need beside predictions and rows."""

    labels: tuple[str, ...] = ()
    """The answers of a classification."""
    file: Path | None = None
    """The benchmark's file, beside which databases are looked for."""
    split: str = ""
    """What that file calls its split."""


class SummedMetric(ABC):
    """Its value on many rows is a formula on sums over them; on resampled rows, too, which gives intervals."""

    names: tuple[str, ...]
    variants: tuple[str, ...]
    """What each name stands for, exactly."""
    version: str
    """The library that computes it, or whose rules are followed."""
    most: float = 1.0
    """The largest value that there can be; the smallest is 0."""

    @property
    @abstractmethod
    def width(self) -> int:
        """How many sums there are."""

    @abstractmethod
    def measure(self, answer: Answer, row: BenchmarkRow) -> Sums:
        """Return what one row adds to the sums, [width]."""

    @abstractmethod
    def conclude(self, sums: Sums) -> Sequence[float]:
        """Return a value for each name."""


class MeanMetric(SummedMetric):
    """The mean over rows of what `score` gives for each."""

    @property
    def width(self) -> int:
        """The values, and a count."""
        return len(self.names) + 1

    @abstractmethod
    def score(self, answer: Answer, row: BenchmarkRow) -> Sequence[float]:
        """Return the values of one row."""

    def measure(self, answer: Answer, row: BenchmarkRow) -> Sums:
        """Return the values of one row, and a 1 to count it."""
        return np.array([*self.score(answer, row), 1.0])

    def conclude(self, sums: Sums) -> Sequence[float]:
        """Return the means."""
        return [float(value / sums[-1]) for value in sums[:-1]]


class CorpusMetric(ABC):
    """It must have seen all rows; there is no interval."""

    names: tuple[str, ...]
    variants: tuple[str, ...]
    version: str

    @abstractmethod
    def add(self, answer: Answer, row: BenchmarkRow) -> None:
        """Take in one row."""

    @abstractmethod
    def conclude(self) -> Sequence[float]:
        """Return a value for each name."""


class MissingResource(Exception):  # noqa: N818 - no error: the metric is null, and says why
    """A metric can't be computed here; the message says why, and what to do."""

    def __init__(self, reason: str, variants: tuple[str, ...]) -> None:
        super().__init__(reason)
        self.variants = variants


@dataclass(frozen=True)
class MetricScore:
    """One number, and what it means."""

    value: float | None
    variant: str
    version: str | None = None
    low: float | None = None
    high: float | None = None
    """Bounds of the 95 % interval, where there can be such values."""
    reason: str | None = None
    """Why there is no value, or no interval."""

    def to_details(self) -> dict[str, object]:
        """Return all but the value."""
        return {name: value for name, value in asdict(self).items() if name != "value"}
