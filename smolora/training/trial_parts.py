"""Parts of a step, each about twice the one before: what a whole step takes is expected from them.

Memory is a straight line in the tokens that a pass holds, and time in the tokens of a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from smolora.data.collate import Layout
from smolora.data.token_dataset import TokenDataset
from smolora.training.plan import StepPlan
from smolora.training.workload import StepSize, count_held, find_largest, find_typical

_FEW_TOKENS = 1024
"""Of the second part: a few seconds where a model is large."""
_ENOUGH_ROWS = 64
"""Of a part that says what a whole pass takes: a quarter of one of thousands takes minutes."""
_PATIENCE = 30.0
"""Seconds for all parts, and the largest once more."""


@dataclass(frozen=True)
class Part:
    """Some rows of a step."""

    passes: list[np.ndarray]
    tokens: int
    """Input tokens, without padding."""
    held: int
    """Tokens of its largest pass, padding included."""

    @classmethod
    def of(cls, dataset: TokenDataset, passes: list[np.ndarray], layout: Layout) -> Part:
        """Count what the rows of these passes hold."""
        lengths = [dataset.lengths[rows] for rows in passes]
        tokens = sum(int(part.sum()) for part in lengths)
        return cls(passes, tokens, max(count_held(part, layout) for part in lengths))


@dataclass(frozen=True)
class PartRun:
    """What a part took."""

    part: Part
    seconds: float
    peak: int
    """Bytes held at most until then."""


@dataclass
class Ladder:
    """The parts to run, from the shortest row on, and what those took that were."""

    parts: list[Part]
    enough: int
    """So many of them say what a step takes that is neither long nor large."""
    runs: list[PartRun] = field(default_factory=list)
    growth: float = 1.0
    """Peak of the largest part that was run twice, over what it was the first time."""

    @classmethod
    def choose(cls, dataset: TokenDataset, plan: StepPlan, sizes: Sequence[StepSize], layout: Layout) -> Ladder:
        """Choose the shortest row, growing parts of a typical pass, then of the largest passes and a typical step."""
        typical = plan.micro_batches(find_typical(sizes).step)
        largest = [_find_largest_pass(dataset, plan.micro_batches(size.step), layout) for size in find_largest(sizes)]
        few = int(_FEW_TOKENS / dataset.lengths[typical[0]].mean())
        enough = min(max(1, len(typical[0]) // 4), _ENOUGH_ROWS)
        chosen = [[np.array([dataset.lengths.argmin()])]]
        chosen += [_take_rows(typical[:1], count) for count in _double(min(max(1, few), enough), enough)]
        most = max(sum(map(len, passes)) for passes in (largest, typical))
        larger = [_take_rows([*largest, *typical], count) for count in _double(2 * enough, most)]
        return cls([Part.of(dataset, part, layout) for part in (*chosen, *larger)], len(chosen))

    @property
    def last(self) -> PartRun:
        """The largest part that was run."""
        return self.runs[-1]

    @property
    def is_enough(self) -> bool:
        """Whether a step that is neither long nor large is known well enough; rows of one length make no line."""
        return len(self.runs) >= self.enough and self.last.part.held > self.parts[0].held

    @property
    def bytes_per_token(self) -> float:
        """What each further token of a pass adds to the peak, by the last two parts that differ in them."""
        last = self.last
        less = next((run for run in reversed(self.runs) if run.part.held < last.part.held), last)
        return self.growth * (last.peak - less.peak) / max(1, last.part.held - less.part.held)

    def add(self, seconds: float, peak: int) -> None:
        """Note what the next part took."""
        self.runs.append(PartRun(self.parts[len(self.runs)], seconds, peak))

    def add_again(self, seconds: float, peak: int) -> None:
        """Note what the last part took when it was run once more: less time, in memory that is there already."""
        self.growth = peak / self.last.peak
        self.runs[-1] = replace(self.last, seconds=min(seconds, self.last.seconds))

    def expect_peak(self, held: int) -> int:
        """Return the bytes held at most once a pass of so many tokens has been run."""
        more = max(0, held - self.last.part.held)
        return math.ceil(self.growth * self.last.peak + self.bytes_per_token * more)

    def expect_seconds(self, tokens: int) -> float:
        """Return the seconds of a step with so many input tokens."""
        return self.last.seconds / self.last.part.tokens * tokens

    def can_grow(self, available: int | None) -> bool:
        """Whether the next part is expected to fit, and there is the patience to run it twice."""
        if len(self.runs) >= len(self.parts):
            return False
        part = self.parts[len(self.runs)]
        spent = sum(run.seconds for run in self.runs)
        is_short = spent + 2 * self.expect_seconds(part.tokens) <= _PATIENCE
        return is_short and (available is None or self.expect_peak(part.held) <= available)


def _double(count: int, end: int) -> Iterator[int]:
    """Yield a count, its doubles, and where they end.

    >>> list(_double(10, 64))
    [10, 20, 40, 64]
    """
    while count < end:
        yield count
        count *= 2
    yield end


def _take_rows(passes: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    """Return the first `count` rows of a step in its passes, of the last pass from all over it: it may be sorted.

    >>> [rows.tolist() for rows in _take_rows([np.arange(3), np.arange(9)], 6)]
    [[0, 1, 2], [0, 4, 8]]
    """
    taken = []
    for rows in passes:
        places = np.linspace(0, len(rows) - 1, min(len(rows), count)).astype(int)
        taken.append(rows[places])
        count -= len(places)
        if not count:
            break
    return taken


def _find_largest_pass(dataset: TokenDataset, passes: Sequence[np.ndarray], layout: Layout) -> np.ndarray:
    return max(passes, key=lambda rows: count_held(dataset.lengths[rows], layout))
