"""Scoring answers as they come, a model's or any system's. No torch: a file of predictions needs none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from itertools import islice

from smolora.data.benchmark_rows import BenchmarkRow
from smolora.evaluation.metric import Answer
from smolora.evaluation.metrics import MetricsCalculator
from smolora.evaluation.prediction_log import PredictionLog
from smolora.evaluation.result import EvaluationResult

Progress = Callable[[int], None]
"""Is told how many rows are done."""


def score_answers(
    answer: Callable[[Sequence[BenchmarkRow]], Sequence[Answer]],
    rows: Iterable[BenchmarkRow],
    calculator: MetricsCalculator,
    *,
    at_once: int,
    log: PredictionLog | None = None,
    progress: Progress = lambda num_rows: None,
    num_trained_on: int | None = None,
) -> EvaluationResult:
    """Score what `answer` says to the rows, `at_once` of them at a time; see `ModelEvaluator.evaluate_dataset`."""
    waiting = iter(rows)
    with log.locked() if log else nullcontext():
        for kept, row in zip(log.replay() if log else (), waiting, strict=False):
            calculator.add(kept, row)
        progress(calculator.num_rows)
        while part := list(islice(waiting, at_once)):
            answers = answer(part)
            scores = [calculator.add(*pair) for pair in zip(answers, part, strict=True)]
            if log:
                log.append(list(zip(part, answers, scores, strict=True)))
            progress(calculator.num_rows)
        folder = log.folder if log else None
        result = EvaluationResult(calculator.conclude(), calculator.num_rows, folder, num_trained_on)
        if log:
            log.finish(result)
    return result
