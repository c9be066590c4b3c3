"""Words to the label of each: one target a word, at its first token.

The words are read as one text with spaces between them, as the model met text before, and found again by the
characters that each token stands for. So a tokenizer that marks a word by the space before it marks these.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np

from smolora.data.encoding import encode_with_template
from smolora.data.labels import iter_labels
from smolora.data.preprocessor import DataPreprocessor, Values
from smolora.data.token_dataset import Example
from smolora.errors import DataError

logger = logging.getLogger(__name__)

Span = tuple[int, int]
"""The first character, and the one behind the last."""


class TokenClassificationPreprocessor(DataPreprocessor):
    """Encodes words, in the tokenizer's own template of a text, with their labels."""

    kinds = ("token_classification",)

    def encode(self, rows: Sequence[Values]) -> list[Example]:
        """Encode rows, one example per row, of any length.

        A word that the tokenizer leaves nothing of, such as a control character, is no target; a warning counts them.

        Raises:
            DataError: A label isn't one of the form's.
        """
        examples = [example for example, _ in self._encode(rows)]
        lost = sum(len(self._words(row)) for row in rows) - sum(example.num_target_tokens for example in examples)
        if lost:
            logger.warning("%d words have no token of their own in this tokenizer, and are no targets", lost)
        return examples

    def cut(self, example: Example, row: Values, limit: int) -> list[Example]:
        """Return the words whose first token is within `limit` tokens, the template's included."""
        return [example for example, _ in self._encode([row], limit)]

    def encode_words(self, row: Values, limit: int | None) -> tuple[Example, list[bool]]:
        """Return a row within `limit` tokens, and of each word whether it is one of the targets, which keep its order.

        Raises:
            DataError: A label isn't one of the form's.
        """
        return self._encode([row], limit)[0]

    def render(self, example: Example) -> list[tuple[str, bool]]:
        """Return the text, with the label of each word in front of it."""
        starts = [0, *np.flatnonzero(example.is_target).tolist(), len(example)]
        labels = [] if example.labels is None else example.labels.tolist()
        shown: list[tuple[str, bool]] = []
        for number, (start, end) in enumerate(itertools.pairwise(starts)):
            shown += [(f" {self.fmt.labels[labels[number - 1]]}:", True)] if number else []
            part = Example(example.input_ids[start:end], np.zeros(end - start, np.bool_))
            shown += super().render(part) if len(part) else []
        return shown

    def _words(self, row: Values) -> Sequence[str]:
        return cast("Sequence[str]", row[self.fmt.columns["tokens"]])

    def _encode(self, rows: Sequence[Values], limit: int | None = None) -> list[tuple[Example, list[bool]]]:
        texts = [" ".join(self._words(row)) for row in rows]
        encoded = encode_with_template(texts, self.tokenizer, limit=limit, with_offsets=True)
        segments = encoded.get("token_type_ids")
        examples = []
        for number, row in enumerate(rows):
            first_tokens = list(find_first_tokens(self._words(row), encoded["offset_mapping"][number]))
            is_target = np.zeros(len(encoded["input_ids"][number]), np.bool_)
            is_target[[token for token in first_tokens if token is not None]] = True
            labels = [
                label for label, token in zip(self._find_labels(row), first_tokens, strict=True) if token is not None
            ]
            example = Example(
                np.asarray(encoded["input_ids"][number], np.int32),
                is_target,
                np.asarray(labels, np.int32),
                None if segments is None else np.asarray(segments[number], np.int32),
            )
            examples.append((example, [token is not None for token in first_tokens]))
        return examples

    def _find_labels(self, row: Values) -> Iterator[int]:
        for name in iter_labels(row, self.fmt):
            if name not in self.fmt.labels:
                raise DataError(f"the label {name!r} isn't learned. Learned are: {', '.join(self.fmt.labels)}.")
            yield self.fmt.labels.index(name)


def find_first_tokens(words: Sequence[str], offsets: Sequence[Span]) -> Iterator[int | None]:
    """Yield the first token of each word, or None where it has none of its own.

    Args:
        words: As they were joined by spaces.
        offsets: The characters of each token; those of special tokens are empty.

    >>> list(find_first_tokens(["ab", "c"], [(0, 0), (0, 1), (1, 2), (2, 4), (0, 0)]))
    [1, 3]
    """
    token, start = 0, 0
    for word in words:
        end = start + len(word)
        while token < len(offsets) and offsets[token][1] <= start:
            token += 1
        if token < len(offsets) and offsets[token][0] < end:
            yield token
            token += 1
        else:
            yield None
        start = end + 1
