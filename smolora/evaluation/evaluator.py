"""Asking a model every row of a benchmark and scoring what it answers, a few rows at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from hashlib import blake2b
from itertools import islice

from smolora.data.benchmark_rows import BenchmarkRow
from smolora.errors import ConfigError, DataError
from smolora.evaluation.likelihood import Likelihood, LikelihoodScorer
from smolora.evaluation.metric import Answer
from smolora.evaluation.metrics import MetricsCalculator
from smolora.evaluation.prediction_log import PredictionLog
from smolora.evaluation.result import EvaluationResult
from smolora.generation.sampling import SamplingSettings
from smolora.generation.text_generator import TextGenerator
from smolora.models.bundle import ModelBundle

logger = logging.getLogger(__name__)

GREEDY = SamplingSettings(temperature=0.0)

_BATCHES_AT_ONCE = 8
"""Rows are asked so many batches at a time: a slot that is free takes the next row, and only at the end some wait."""

Progress = Callable[[int], None]
"""Is told how many rows are done."""


class ModelEvaluator:
    """Asks one model, by the project's one generator.

    Example:
        evaluator = ModelEvaluator(load_bundle("RUN"))
        benchmark = get_benchmark("sick")
        rows = benchmark.iter_rows("test", benchmark.find("test", "nli"))
        print(evaluator.evaluate_dataset(rows, get_metrics_calculator("sick")).describe())
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
        self.bundle = bundle
        self.settings = settings
        self.batch_size = batch_size
        self.labels = tuple(labels)
        self._generator = TextGenerator(bundle)
        self._num_cut = 0
        self._scorer = LikelihoodScorer(bundle, batch_size=batch_size)

    def evaluate_dataset(
        self,
        rows: Iterable[BenchmarkRow],
        calculator: MetricsCalculator,
        *,
        log: PredictionLog | None = None,
        progress: Progress = lambda num_rows: None,
    ) -> EvaluationResult:
        """Ask every row, score the answers, and keep both in `log`, which may hold the first of them already.

        Raises:
            DataError: A prompt leaves no room in the model's context.
            StorageError: The log can't be written.
            FolderInUseError: Another evaluation writes there.
        """

        def ask(part: Sequence[BenchmarkRow]) -> list[Answer]:
            return self.answer(part, first=calculator.num_rows)

        self._num_cut = 0
        result = score_answers(ask, rows, calculator, at_once=self._at_once, log=log, progress=progress)
        if self._num_cut:
            logger.warning(
                "%d references are cut at the model's context of %s tokens: the loss is without what is past it.",
                self._num_cut,
                self.bundle.context,
            )
        return result

    def answer(self, rows: Sequence[BenchmarkRow], *, first: int = 0) -> list[Answer]:
        """Return the model's answers, with the loss of the references; a row without a prompt has the loss alone.

        Args:
            rows: What is asked.
            first: Number of the first of them among all rows: with the seed, it decides what is drawn at random.

        Raises:
            DataError: A prompt leaves no room for an answer, or for a label, in the model's context.
        """
        losses = self._measure_references(rows)
        if self.labels:
            answers = [Answer(label, label=label) for label in self._choose_labels(rows)]
        else:
            asked = [(row.prompt, self._settings_of(number)) for number, row in enumerate(rows, first) if row.prompt]
            prompts, settings = [prompt for prompt, _ in asked], [own for _, own in asked]
            texts = iter(self._generator.generate(prompts, settings=settings, batch_size=self.batch_size))
            answers = [Answer(next(texts) if row.prompt else "") for row in rows]
        return [
            Answer(answer.text, answer.label, loss.loss_sum, loss.num_tokens)
            for answer, loss in zip(answers, losses, strict=True)
        ]

    @property
    def _at_once(self) -> int:
        return self.batch_size * _BATCHES_AT_ONCE

    def _settings_of(self, number: int) -> SamplingSettings:
        """Return the settings with a seed of the row's own: a row is drawn alike whatever it is asked with."""
        if self.settings.seed is None:
            return self.settings
        digest = blake2b(f"{self.settings.seed} {number}".encode(), digest_size=8).digest()
        own: SamplingSettings = self.settings.replace(seed=int.from_bytes(digest, "little") >> 1)
        return own

    def _measure_references(self, rows: Sequence[BenchmarkRow]) -> list[Likelihood]:
        """Return the loss of all references of each row."""
        each = self._scorer.measure([(row.prompt, text) for row in rows for text in row.references])
        self._num_cut += sum(not one.is_whole for one in each)
        measured = iter(each)
        found = [list(islice(measured, len(row.references))) for row in rows]
        return [Likelihood(sum(one.loss_sum for one in of), sum(one.num_tokens for one in of)) for of in found]

    def _choose_labels(self, rows: Sequence[BenchmarkRow]) -> Iterator[str]:
        measured = iter(self._scorer.measure([(row.prompt, label) for row in rows for label in self.labels]))
        for row in rows:
            found = list(islice(measured, len(self.labels)))
            if not all(one.is_whole for one in found):
                raise DataError(
                    f"a prompt leaves no room for the labels in the model's context of {self.bundle.context} tokens: "
                    f"{str(row.prompt)[:60]!r}. Shorten it."
                )
            losses = [one.loss_sum for one in found]
            yield self.labels[losses.index(min(losses))]


def score_answers(
    answer: Callable[[Sequence[BenchmarkRow]], Sequence[Answer]],
    rows: Iterable[BenchmarkRow],
    calculator: MetricsCalculator,
    *,
    at_once: int,
    log: PredictionLog | None = None,
    progress: Progress = lambda num_rows: None,
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
        result = EvaluationResult(calculator.conclude(), calculator.num_rows, log.folder if log else None)
        if log:
            log.finish(result)
    return result
