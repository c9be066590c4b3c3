"""Asking a text classifier: one forward pass answers a row, and nothing is generated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from smolora.data.benchmark_rows import BenchmarkRow
from smolora.data.preprocessing import get_preprocessor
from smolora.data.prompts import PromptFormat
from smolora.data.token_dataset import Example
from smolora.errors import DataError, count_of
from smolora.evaluation.head_logits import compute_head_logits
from smolora.evaluation.head_rows import read_texts
from smolora.evaluation.metric import Answer
from smolora.models.bundle import ModelBundle

Texts = Sequence[str]
"""What is classified together: one text, or two."""

_ROLES = ("text", "text_pair")


class LabelAsker:
    """Asks a classifier of texts; the label with the highest logit is its answer."""

    def __init__(self, bundle: ModelBundle, *, batch_size: int) -> None:
        self.bundle = bundle
        self.batch_size = batch_size
        self._num_cut = 0

    def describe_cuts(self) -> str | None:
        """Return how many rows were too long so far, as a sentence; None where none was."""
        if not self._num_cut:
            return None
        return f"cut at the model's context of {self.bundle.context} tokens: {count_of(self._num_cut, 'row')}."

    def answer(self, rows: Sequence[BenchmarkRow], *, first: int = 0) -> list[Answer]:
        """Return the labels that the head gives, with -log p of the right ones, in nats.

        Args:
            rows: Texts to classify, with the right label of each as the reference.
            first: Unused: nothing is drawn at random.

        Raises:
            DataError: A row has no texts, or another number of them than the others.
        """
        found = self.measure([read_texts(row) for row in rows])
        labels = self.bundle.labels
        chosen = [labels[int(place)] for place in found.argmax(axis=1)]
        losses = [-float(line[labels.index(row.references[0])]) for line, row in zip(found, rows, strict=True)]
        return [Answer(label, label, loss, 1) for label, loss in zip(chosen, losses, strict=True)]

    def measure(self, rows: Sequence[Texts]) -> npt.NDArray[np.float64]:
        """Return log p of every label, [N, C], in the order of the bundle's labels.

        Raises:
            DataError: A row has another number of texts than the others.
        """
        logits = compute_head_logits(self.bundle, self._encode(rows), batch_size=self.batch_size)
        losses = [own[0].log_softmax(dim=-1).double().numpy() for own in logits]
        return np.stack(losses) if losses else np.zeros((0, len(self.bundle.labels)))

    def _encode(self, rows: Sequence[Texts]) -> list[Example]:
        if not rows:
            return []
        if len({len(texts) for texts in rows}) > 1:
            raise DataError("some rows have one text and some two: give all the same number.")
        columns = {role: role for role in _ROLES[: len(rows[0])]}
        labels = self.bundle.labels
        fmt = PromptFormat(kind="classification", columns={**columns, "label": "label"}, labels=labels)
        preprocessor = get_preprocessor(self.bundle.task, fmt=fmt, tokenizer=self.bundle.tokenizer)
        values = [{**dict(zip(columns, texts, strict=True)), "label": labels[0]} for texts in rows]
        limit, examples = self.bundle.context, preprocessor.encode(values)
        if limit is None:
            return examples
        is_long = [len(example) > limit for example in examples]
        self._num_cut += sum(is_long)
        return [
            preprocessor.cut(example, row, limit)[0] if too_long else example
            for example, row, too_long in zip(examples, values, is_long, strict=True)
        ]
