"""Asking a token classifier: every word of a row gets the label with the highest logit at its first token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from smolora.data.benchmark_rows import TAGS, WORDS, BenchmarkRow
from smolora.data.prompts import PromptFormat
from smolora.data.word_labels import TokenClassificationPreprocessor
from smolora.evaluation.head_logits import compute_head_logits
from smolora.evaluation.head_rows import read_words
from smolora.evaluation.metric import Answer
from smolora.models.bundle import ModelBundle

Words = Sequence[str]


class WordAsker:
    """Asks a classifier of words."""

    def __init__(self, bundle: ModelBundle, *, batch_size: int) -> None:
        self.bundle = bundle
        self.batch_size = batch_size
        self._num_lost = 0

    def describe_cuts(self) -> str | None:
        """Return how many words had no label so far, as a sentence; None where all had one."""
        if not self._num_lost:
            return None
        place = "" if self.bundle.context is None else f" within the model's context of {self.bundle.context} tokens"
        return f"{self._num_lost:,} words have no token of their own{place}: they get no label, and count as wrong."

    def answer(self, rows: Sequence[BenchmarkRow], *, first: int = 0) -> list[Answer]:
        """Return the label of every word, with -log p of the right ones, in nats.

        Args:
            rows: Words, with the right label of each.
            first: Unused: nothing is drawn at random.

        Raises:
            DataError: A row has no words.
        """
        found = self.measure([read_words(row)[0] for row in rows])
        return [self._answer(measured, row) for measured, row in zip(found, rows, strict=True)]

    def measure(self, rows: Sequence[Words]) -> list[npt.NDArray[np.float64]]:
        """Return, for each row, log p of every label of every word, [words, C], in the order of the bundle's labels.

        A word without a token of its own within the model's context isn't a number.
        """
        labels, tokenizer = self.bundle.labels, self.bundle.tokenizer
        fmt = PromptFormat(kind="token_classification", columns={"tokens": WORDS, "tags": TAGS}, labels=labels)
        preprocessor = TokenClassificationPreprocessor(fmt, tokenizer)
        values = [{WORDS: list(words), TAGS: labels[:1] * len(words)} for words in rows]
        encoded = [preprocessor.encode_words(row, self.bundle.context) for row in values]
        logits = compute_head_logits(self.bundle, [example for example, _ in encoded], batch_size=self.batch_size)
        found = [np.full((len(words), len(labels)), np.nan) for words in rows]
        for measured, own, (_, is_asked) in zip(found, logits, encoded, strict=True):
            if len(own):
                measured[is_asked] = own.log_softmax(dim=-1).double().numpy()
            self._num_lost += is_asked.count(False)
        return found

    def _answer(self, measured: npt.NDArray[np.float64], row: BenchmarkRow) -> Answer:
        labels = self.bundle.labels
        right = [line[labels.index(tag)] for line, tag in zip(measured, read_words(row)[1], strict=True)]
        chosen = tuple("" if np.isnan(line).any() else labels[int(line.argmax())] for line in measured)
        num_asked = sum(map(bool, chosen))
        return Answer(" ".join(chosen), labels=chosen, loss_sum=-float(np.nansum(right)), num_tokens=num_asked)
