"""Asking a model every row of a benchmark and scoring what it answers, a few rows at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Protocol

from smolora.data.benchmark_rows import BenchmarkRow
from smolora.errors import ConfigError
from smolora.evaluation.heads import open_head
from smolora.evaluation.metric import Answer
from smolora.evaluation.metrics import MetricsCalculator
from smolora.evaluation.prediction_log import PredictionLog
from smolora.evaluation.result import EvaluationResult
from smolora.evaluation.scoring import Progress, score_answers
from smolora.evaluation.text_asker import TextAsker
from smolora.generation.sampling import SamplingSettings
from smolora.models.bundle import ModelBundle
from smolora.models.tasks import HEAD_TASKS

logger = logging.getLogger(__name__)

GREEDY = SamplingSettings(temperature=0.0)

_BATCHES_AT_ONCE = 8
"""Rows are asked so many batches at a time: a slot that is free takes the next row, and only at the end some wait."""


class Asker(Protocol):
    """How a model of some task is asked."""

    def answer(self, rows: Sequence[BenchmarkRow], *, first: int = 0) -> list[Answer]:
        """Return what it answers, with the loss of what would be right; `first` is the first row's number."""
        ...

    def describe_cuts(self) -> str | None:
        """Return what didn't fit into the model's context so far, as a sentence; None where all did."""
        ...


class ModelEvaluator:
    """Asks one model: one that writes by the project's one generator, a task's head directly.

    Example:
        ```python
        from itertools import islice

        from smolora import get_metrics_calculator, load_bundle
        from smolora.data.benchmarks import get_benchmark

        evaluator = ModelEvaluator(load_bundle("restaurants"))
        benchmark = get_benchmark("sick")
        rows = islice(benchmark.iter_rows("test", benchmark.find("test", "data/nli")), 10)
        print(evaluator.evaluate_dataset(rows, get_metrics_calculator("sick")).describe())
        ```
    """

    def __init__(
        self,
        bundle: ModelBundle,
        *,
        settings: SamplingSettings = GREEDY,
        batch_size: int = 16,
        labels: Sequence[str] = (),
    ) -> None:
        """Choose how the model is asked.

        Args:
            bundle: The model.
            settings: How answers are drawn; greedy by default.
            batch_size: Rows that are answered at a time.
            labels: Answer with the likeliest of these, in place of written text.

        Raises:
            ConfigError: No rows are answered at a time.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, found {batch_size}.")
        self.batch_size = batch_size
        self._asker: Asker = (
            open_head(bundle, batch_size=batch_size)
            if bundle.task in HEAD_TASKS
            else TextAsker(bundle, settings=settings, batch_size=batch_size, labels=labels)
        )

    def evaluate_dataset(
        self,
        rows: Iterable[BenchmarkRow],
        calculator: MetricsCalculator,
        *,
        log: PredictionLog | None = None,
        progress: Progress = lambda num_rows: None,
        num_trained_on: int | None = None,
    ) -> EvaluationResult:
        """Ask every row, score the answers, and keep both in `log`, which may hold the first of them already.

        `num_trained_on` goes into the result as it is.

        Raises:
            DataError: A prompt leaves no room in the model's context.
            StorageError: The log can't be written.
            FolderInUseError: Another evaluation writes there.
        """

        def ask(part: Sequence[BenchmarkRow]) -> list[Answer]:
            return self.answer(part, first=calculator.num_rows)

        result = score_answers(
            ask,
            rows,
            calculator,
            at_once=self._at_once,
            log=log,
            progress=progress,
            num_trained_on=num_trained_on,
        )
        if cuts := self._asker.describe_cuts():
            logger.warning("%s", cuts)
        return result

    def answer(self, rows: Sequence[BenchmarkRow], *, first: int = 0) -> list[Answer]:
        """Return the model's answers, with the loss of what would be right; see the asker of its task."""
        return self._asker.answer(rows, first=first)

    @property
    def _at_once(self) -> int:
        return self.batch_size * _BATCHES_AT_ONCE
