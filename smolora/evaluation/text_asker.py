"""Asking a language model: the answers it writes, or the likeliest of a few labels, and the loss of the references."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import islice

from smolora.data.benchmark_rows import GOES_ON, BenchmarkRow
from smolora.errors import DataError
from smolora.evaluation.likelihood import Likelihood, LikelihoodScorer
from smolora.evaluation.metric import Answer
from smolora.generation.sampling import SamplingSettings
from smolora.generation.text_generator import TextGenerator
from smolora.models.bundle import ModelBundle


class TextAsker:
    """Asks a model that writes, by the project's one generator."""

    def __init__(
        self, bundle: ModelBundle, *, settings: SamplingSettings, batch_size: int, labels: Sequence[str] = ()
    ) -> None:
        self.bundle = bundle
        self.settings = settings
        self.batch_size = batch_size
        self.labels = tuple(labels)
        self._generator = TextGenerator(bundle)
        self._scorer = LikelihoodScorer(bundle, batch_size=batch_size)
        self._num_cut = 0

    def describe_cuts(self) -> str | None:
        """Return what didn't fit into the model's context so far, as a sentence; None where all did."""
        if not self._num_cut:
            return None
        return (
            f"{self._num_cut} references are cut at the model's context of {self.bundle.context} tokens: the loss is "
            "without what is past it."
        )

    def answer(self, rows: Sequence[BenchmarkRow], *, first: int = 0) -> list[Answer]:
        """Return the model's answers, with the loss of the references; a row without a prompt has the loss alone.

        Args:
            rows: What is asked.
            first: Number of the first of them among all rows: with the seed, it decides what is drawn at random.

        Raises:
            DataError: A prompt leaves no room for an answer, or for a label, in the model's context.
        """
        if not self.labels:
            self._check_room(rows, first)
        losses = self._measure_references(rows)
        if self.labels:
            answers = [Answer(label, label=label) for label in self._choose_labels(rows, first)]
        else:
            asked = [(row.prompt, self._settings_of(number)) for number, row in enumerate(rows, first) if row.prompt]
            prompts, settings = [prompt for prompt, _ in asked], [own for _, own in asked]
            texts = iter(self._generator.generate(prompts, settings=settings, batch_size=self.batch_size))
            answers = [Answer(next(texts) if row.prompt else "") for row in rows]
        return [
            Answer(answer.text, answer.label, loss.loss_sum, loss.num_tokens)
            for answer, loss in zip(answers, losses, strict=True)
        ]

    def _check_room(self, rows: Sequence[BenchmarkRow], first: int) -> None:
        longest = self._generator.longest_prompt
        for number, row in enumerate(rows if math.isfinite(longest) else (), first):
            num_tokens = self._generator.count_tokens(row.prompt) if row.prompt else 0
            if num_tokens > longest:
                raise DataError(
                    f"{_name_row(row, number)}: its prompt of {num_tokens:,} tokens leaves no room for an answer in "
                    f"the model's context of {self.bundle.context:,} tokens. {_suggest(number)}"
                )

    def _settings_of(self, number: int) -> SamplingSettings:
        """Return the settings with a seed of the row's own: a row is drawn alike whatever it is asked with."""
        if self.settings.seed is None:
            return self.settings
        digest = blake2b(f"{self.settings.seed} {number}".encode(), digest_size=8).digest()
        own: SamplingSettings = self.settings.replace(seed=int.from_bytes(digest, "little") >> 1)
        return own

    def _measure_references(self, rows: Sequence[BenchmarkRow]) -> list[Likelihood]:
        """Return the loss of all references of each row."""
        asked = [(row, text) for row in rows for text in row.references]
        unended = {number for number, (row, _) in enumerate(asked) if GOES_ON in row.facts}
        each = self._scorer.measure([(row.prompt, text) for row, text in asked], unended=unended)
        self._num_cut += sum(not one.is_whole for one in each)
        measured = iter(each)
        found = [list(islice(measured, len(row.references))) for row in rows]
        return [Likelihood(sum(one.loss_sum for one in of), sum(one.num_tokens for one in of)) for of in found]

    def _choose_labels(self, rows: Sequence[BenchmarkRow], first: int) -> Iterator[str]:
        measured = iter(self._scorer.measure([(row.prompt, label) for row in rows for label in self.labels]))
        for number, row in enumerate(rows, first):
            found = list(islice(measured, len(self.labels)))
            if not all(one.is_whole for one in found):
                num_tokens = self._generator.count_tokens(row.prompt)
                raise DataError(
                    f"{_name_row(row, number)}: its prompt of {num_tokens:,} tokens leaves no room for the labels in "
                    f"the model's context of {self.bundle.context:,} tokens. {_suggest(number)}"
                )
            losses = [one.loss_sum for one in found]
            yield self.labels[losses.index(min(losses))]


def _name_row(row: BenchmarkRow, number: int) -> str:
    return row.origin or f"row {number + 1:,}"


def _suggest(number: int) -> str:
    """Return what to do about row `number`, counted from 0, that doesn't fit."""
    shorter = "Shorten it, leave the row out, or take a model with a longer context"
    return f"{shorter}; --num-samples {number} evaluates the rows before it." if number else f"{shorter}."
