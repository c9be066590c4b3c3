"""Texts, or pairs of them, to the label of each: one target a row, at its last token.

A model that reads both ways pools the row as it does; one that reads forwards answers where it has read all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from smolora.data.encoding import encode_with_template
from smolora.data.labels import iter_labels
from smolora.data.preprocessor import DataPreprocessor, Values
from smolora.data.token_dataset import Example
from smolora.errors import DataError


class TextClassificationPreprocessor(DataPreprocessor):
    """Encodes texts, in the tokenizer's own template of one or two, with their labels."""

    kinds = ("classification",)

    def encode(self, rows: Sequence[Values]) -> list[Example]:
        """Encode rows, one example per row, of any length.

        Raises:
            DataError: A label isn't one of the form's.
        """
        return self._encode(rows)

    def cut(self, example: Example, row: Values, limit: int) -> list[Example]:
        """Return the row within `limit` tokens: of two texts the longer one is cut, token by token."""
        return self._encode([row], limit)

    def render(self, example: Example) -> list[tuple[str, bool]]:
        """Return the text and its label."""
        shown = super().render(Example(example.input_ids, np.zeros_like(example.is_target)))
        labels = [] if example.labels is None else example.labels.tolist()
        return [*shown, (" ", False), *((self.fmt.labels[label], True) for label in labels)]

    def _encode(self, rows: Sequence[Values], limit: int | None = None) -> list[Example]:
        columns = self.fmt.columns
        texts = [str(row[columns["text"]]) for row in rows]
        pairs = [str(row[columns["text_pair"]]) for row in rows] if "text_pair" in columns else None
        encoded = encode_with_template(texts, self.tokenizer, pairs, limit=limit)
        segments = encoded.get("token_type_ids")
        examples = []
        for number, (row, ids) in enumerate(zip(rows, encoded["input_ids"], strict=True)):
            is_target = np.zeros(len(ids), np.bool_)
            is_target[-1:] = True
            labels = [self._find_label(row)] * len(ids[-1:])
            examples.append(
                Example(
                    np.asarray(ids, np.int32),
                    is_target,
                    np.asarray(labels, np.int32),
                    None if segments is None else np.asarray(segments[number], np.int32),
                )
            )
        return examples

    def _find_label(self, row: Values) -> int:
        (name,) = iter_labels(row, self.fmt)
        if name not in self.fmt.labels:
            raise DataError(f"the label {name!r} isn't learned. Learned are: {', '.join(self.fmt.labels)}.")
        return self.fmt.labels.index(name)
