"""The loss of held-out rows under base and tuned model, row by row; and under the tuned one with other rows' prompts.

The last tells what was learned. A model that was trained on shuffled answers learns their form and how frequent each
is, so its loss falls; but it holds an answer as likely after another row's prompt as after its own.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from smolora.adapters.toggling import disabled_adapter
from smolora.config.model import TaskType
from smolora.data.token_dataset import TokenDataset
from smolora.evaluation.answers import HeadLossMetric, LossMetric
from smolora.evaluation.bootstrap import Tally
from smolora.evaluation.comparison import (
    FEWEST_ANSWERS,
    LEAST_LOSS_SHARE,
    Before,
    Budget,
    Comparison,
    bound_differences,
)
from smolora.evaluation.likelihood import Likelihood, LikelihoodScorer
from smolora.evaluation.metric import Sums, finite
from smolora.evaluation.swapped_prompts import PromptSwapper
from smolora.models.bundle import ModelBundle
from smolora.models.tasks import HEAD_TASKS

_MOST_BATCHES_AT_ONCE = 8


@dataclass(frozen=True)
class PromptUse:
    """Loss of the tuned model's answers after their own prompts, and after those of other rows."""

    own: float
    other: float
    low: float | None
    high: float | None
    """Bounds of the 95 % interval of the difference, other less own."""
    num_rows: int
    is_of_questions: bool = False
    """Whether the prompts are questions, and the others those about the same contexts."""

    @property
    def is_sure(self) -> bool:
        """Whether the right prompt surely makes the right answer likelier, and by more than a trace."""
        return self.low is not None and self.low > 0 and self.other - self.own >= LEAST_LOSS_SHARE * self.own

    def to_dict(self) -> dict[str, object]:
        """Return the numbers as plain values."""
        values = {"own": finite(self.own), "other": finite(self.other), "difference": finite(self.other - self.own)}
        return {**values, "low": self.low, "high": self.high, "num_rows": self.num_rows}


def compare_losses(
    bundle: ModelBundle,
    rows: TokenDataset,
    *,
    before: Before = disabled_adapter,
    budget: Budget,
    batch_size: int = 8,
    seed: int = 0,
) -> tuple[Comparison, PromptUse | None]:
    """Measure rows in a seeded order as long as there is time for more of them; 16 in any case.

    Args:
        bundle: A base with an adapter.
        rows: Encoded held-out rows.
        before: Makes it the base of the comparison.
        budget: The time.
        batch_size: Rows in one forward pass.
        seed: Of the order.
    """
    examples = [rows[index] for index in random.Random(seed).sample(range(len(rows)), len(rows))]
    scorer, swapper = LikelihoodScorer(bundle, batch_size=batch_size), PromptSwapper(examples, bundle)
    tally = Tally(7)
    start, num_batches = 0, -(-FEWEST_ANSWERS // batch_size)
    while start < len(examples) and num_batches:
        began = budget.spent
        stop = min(start + batch_size * num_batches, len(examples))
        swapped = [swapper.swap(index) for index in range(start, stop)]
        tuned = scorer.measure_examples(examples[start:stop])
        other = iter(scorer.measure_examples([example for example in swapped if example is not None]))
        with before(bundle):
            base = scorer.measure_examples(examples[start:stop])
        for earlier, later, mate in zip(base, tuned, swapped, strict=True):
            tally.add(_to_sums(earlier, later, None if mate is None else next(other)))
        start = stop
        of_a_batch = (budget.spent - began) / num_batches
        num_batches = min(_MOST_BATCHES_AT_ONCE, int(max(0.0, budget.left) / of_a_batch))
    return _conclude(tally, bundle.task)


def _to_sums(base: Likelihood, tuned: Likelihood, other: Likelihood | None) -> Sums:
    swapped = (tuned.loss_sum, other.loss_sum, other.num_tokens, 1) if other else (0, 0, 0, 0)
    return np.array([base.loss_sum, tuned.loss_sum, base.num_tokens, *swapped], np.float64)


def _conclude(tally: Tally, task: TaskType) -> tuple[Comparison, PromptUse | None]:
    with np.errstate(invalid="ignore", divide="ignore"):  # A resampling of few rows may hold none.
        base, tuned, _, own, other, _ = tally.sums[:6] / np.repeat(tally.sums[[2, 5]], 3)
        resampled = tally.resampled[:, :6] / np.repeat(tally.resampled[:, [2, 5]], 3, axis=1)
    low, high = bound_differences(resampled[:, 0], resampled[:, 1], num_rows=tally.num_rows)
    metric = HeadLossMetric if task in HEAD_TASKS else LossMetric
    variant, version = metric.variants[0], metric.version
    loss = Comparison(
        name="loss",
        base=float(base),
        tuned=float(tuned),
        low=low,
        high=high,
        num_rows=tally.num_rows,
        variant=variant,
        version=version,
    )
    num_swapped = round(tally.sums[6])
    if not tally.sums[5] or (task == "qa" and num_swapped < FEWEST_ANSWERS):  # Few contexts have two questions.
        return loss, None
    low, high = bound_differences(resampled[:, 3], resampled[:, 4], num_rows=num_swapped)
    return loss, PromptUse(float(own), float(other), low, high, num_swapped, is_of_questions=task == "qa")
