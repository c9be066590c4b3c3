"""Asking a model for question answering: the best answer in a context, read over all of its windows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from smolora.data.benchmark_rows import BenchmarkRow
from smolora.data.prompts import PromptFormat
from smolora.data.spans import QuestionAnsweringPreprocessor, SpanAnswer, Window, find_answer
from smolora.errors import DataError
from smolora.evaluation.head_logits import compute_head_logits
from smolora.evaluation.head_rows import Asked, read_question
from smolora.evaluation.metric import Answer
from smolora.models.bundle import ModelBundle
from smolora.training.loss import sum_cross_entropy

_FORM = PromptFormat(kind="qa", columns={role: role for role in ("context", "question", "answers")})


class SpanAsker:
    """Asks a model that finds answers in contexts.

    One that was tuned on questions without an answer too says nothing where position 0 is likelier than the best span.
    Others always answer: position 0 is one place, and answers that a model is unsure of share their likelihood.
    """

    def __init__(self, bundle: ModelBundle, *, batch_size: int) -> None:
        self.bundle = bundle
        self.batch_size = batch_size

    def describe_cuts(self) -> str | None:
        """Return None: a context that is too long is read in windows, and a question is never cut."""
        return None

    def answer(self, rows: Sequence[BenchmarkRow], *, first: int = 0) -> list[Answer]:
        """Return the answers, with -log p of where in each window the right one begins and ends, in nats.

        Args:
            rows: Questions about contexts; of several answers, the loss is that of the first.
            first: Unused: nothing is drawn at random.

        Raises:
            DataError: A row is no question about a context, or the question leaves no room for its context.
        """
        windows = [
            self._encode(read_question(row), row.origin or f"row {first + i + 1:,}") for i, row in enumerate(rows)
        ]
        answers = []
        for row, own, logits in zip(rows, windows, self._compute(windows), strict=True):
            found = _read(read_question(row), own, logits)
            losses = [_measure(one, window) for one, window in zip(logits, own, strict=True)]
            answers.append(Answer(self.say(found), loss_sum=sum(losses), num_tokens=2 * len(losses)))
        return answers

    def has_room(self, row: BenchmarkRow) -> bool:
        """Whether the question of a row leaves room for its context."""
        try:
            return bool(self._encode(read_question(row), row.origin))
        except DataError:
            return False

    def find(self, asked: Sequence[Asked]) -> list[SpanAnswer]:
        """Return the best answer to each question, its place in the context, and how it scores.

        Raises:
            DataError: A question leaves no room for its context.
        """
        windows = [self._encode({**one, "answers": []}, f"question {i:,}") for i, one in enumerate(asked, start=1)]
        return [_read(*one) for one in zip(asked, windows, self._compute(windows), strict=True)]

    def say(self, found: SpanAnswer) -> str:
        """Return the text of an answer, or nothing."""
        trained = self.bundle.prompt_format
        may_lack_one = trained is not None and trained.may_lack_answer
        return "" if may_lack_one and found.null_score > found.score else found.text

    def _encode(self, asked: Asked, name: str) -> list[Window]:
        try:
            preprocessor = QuestionAnsweringPreprocessor(_FORM, self.bundle.tokenizer)
            return preprocessor.encode_windows(asked, self.bundle.context)
        except DataError as error:
            raise DataError(f"{name}: {error}.") from error

    def _compute(self, windows: Sequence[Sequence[Window]]) -> list[list[Tensor]]:
        """Return the logits of every window of every question, [2, T]."""
        examples = [window.example for own in windows for window in own]
        logits = iter(compute_head_logits(self.bundle, examples, batch_size=self.batch_size))
        return [list(islice(logits, len(own))) for own in windows]


def _read(asked: Asked, windows: Sequence[Window], logits: Sequence[Tensor]) -> SpanAnswer:
    pairs = [(starts, ends) for starts, ends in (one.numpy() for one in logits)]
    return find_answer(str(asked["context"]), windows, pairs)


def _measure(logits: Tensor, window: Window) -> float:
    labels = window.example.labels
    assert labels is not None, "windows have the place of an answer, or position 0"
    return sum_cross_entropy(logits, torch.from_numpy(labels).long()).item()
