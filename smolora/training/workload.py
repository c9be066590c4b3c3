"""What the steps of a run hold, and how long each takes: known before the first one, since their rows are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from smolora.data.collate import Layout
from smolora.data.token_dataset import TokenDataset
from smolora.runtime.seeding import permutation
from smolora.training.plan import StepPlan


class StepSize(NamedTuple):
    """What one update of a single process holds."""

    step: int
    """Updates before it."""
    tokens: int
    """Input tokens, without padding."""
    held: int
    """Tokens of its largest pass, padding included."""
    targets: int
    """Target tokens of the pass with the most."""
    squares: int
    """Sum over rows of their squared lengths, in the pass with the most: what attention grows with."""


def measure_steps(dataset: TokenDataset, plan: StepPlan, *, layout: Layout, first: int = 0) -> list[StepSize]:
    """Return the size of every update of a run from `first` (from 0) on."""
    targets = np.array([example.num_target_tokens for example in dataset])
    return [_measure_step(step, plan, dataset.lengths, targets, layout) for step in range(first, plan.total_steps)]


def _measure_step(
    step: int, plan: StepPlan, lengths: npt.NDArray[np.int64], targets: npt.NDArray[np.int64], layout: Layout
) -> StepSize:
    passes = plan.micro_batches(step)
    return StepSize(
        step,
        tokens=sum(int(lengths[rows].sum()) for rows in passes),
        held=max(count_held(lengths[rows], layout) for rows in passes),
        targets=max(int(targets[rows].sum()) for rows in passes),
        squares=max(int((lengths[rows] ** 2).sum()) for rows in passes),
    )


def count_held(lengths: npt.NDArray[np.int64], layout: Layout) -> int:
    """Return the tokens that a pass over rows of these lengths holds, padding included."""
    return int(lengths.max() * len(lengths) if layout == "padded" else lengths.sum())


def find_typical(sizes: Sequence[StepSize]) -> StepSize:
    """Return the step of middle size."""
    return sorted(sizes, key=lambda size: size.tokens)[len(sizes) // 2]


def find_largest(sizes: Sequence[StepSize]) -> list[StepSize]:
    """Return the steps that can be the peak of memory: the most tokens, targets or squares in one pass."""
    largest = [
        max(sizes, key=lambda size: size.held),
        max(sizes, key=lambda size: size.targets),
        max(sizes, key=lambda size: size.squares),
    ]
    return list(dict.fromkeys(largest))


def sample_steps(sizes: Sequence[StepSize], count: int) -> list[StepSize]:
    """Return `count` steps, as many from each part of the range of sizes, in an order that mixes them."""
    ordered = sorted(sizes, key=lambda size: size.tokens)
    places = ((np.arange(count) + 0.5) / count * len(ordered)).astype(int)
    return [ordered[place] for place in places[permutation(count, 0, "sample")]]


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: `fixed + per_token * input tokens`."""

    fixed: float
    per_token: float

    @classmethod
    def fit(cls, tokens: Sequence[int], seconds: Sequence[float]) -> StepTime:
        """Return the least-squares line through measured steps, neither part below zero.

        It keeps their mean. Attention's squares need no term: steps from the whole range of sizes are measured.

        >>> StepTime.fit([100, 200], [0.5, 0.75])
        StepTime(fixed=0.25, per_token=0.0025)
        """
        x, y = np.array(tokens, dtype=np.float64), np.array(seconds)
        spread = float(((x - x.mean()) ** 2).sum())
        slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread if spread else 0.0
        slope = min(max(slope, 0.0), float(y.mean() / x.mean()))
        return cls(float(y.mean() - slope * x.mean()), slope)

    def predict(self, tokens: int) -> float:
        """Return the seconds of a step with so many input tokens."""
        return self.fixed + self.per_token * tokens
