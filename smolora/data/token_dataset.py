"""Examples in memory: three flat arrays for rows, one array of tokens for pretraining. NumPy only, no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from smolora.errors import DataError

TokenArray = npt.NDArray[np.int32]
MaskArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Example:
    """One encoded row.

    Of text, `is_target[t]` says that token t is predicted, from the tokens before it; position 0 never is. A task with
    `labels` predicts those instead: one for each marked position (classification, token classification), the first and
    last position of an answer among the marked ones (qa), or the tokens of an answer of its own (seq2seq, no marks).
    """

    input_ids: TokenArray
    is_target: MaskArray
    labels: TokenArray | None = None
    """The ids to predict, where they aren't the row's own tokens."""
    token_type_ids: TokenArray | None = None
    """Which segment each token is of, for tokenizers that tell two of them apart."""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_target_tokens(self) -> int:
        """What the loss counts: target tokens, or labels."""
        return int(self.is_target.sum()) if self.labels is None else len(self.labels)


class ExampleDataset(Protocol):
    """Rows by index; `fingerprint` tells two datasets apart."""

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def build_example(ids: Sequence[int], target_spans: Sequence[tuple[int, int]]) -> Example:
    """Return the example whose targets are the positions of `target_spans` (start, end), without position 0."""
    input_ids = np.asarray(ids, dtype=np.int32)
    is_target = np.zeros(len(input_ids), dtype=np.bool_)
    for start, end in target_spans:
        is_target[start:end] = True
    is_target[:1] = False  # Nothing stands before the first token to predict it from.
    return Example(input_ids, is_target)


class TokenDataset:
    """Examples of any length, kept end to end in flat arrays: 5 bytes a token, and 4 a label or a segment's number.

    Either all of them have labels or none has, and so with segments.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        self.lengths: npt.NDArray[np.int64] = np.array([len(example) for example in examples], dtype=np.int64)
        self._starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.lengths)])
        self._input_ids: TokenArray = np.concatenate(
            [np.zeros(0, np.int32), *(example.input_ids for example in examples)]
        )
        self._is_target: MaskArray = np.concatenate(
            [np.zeros(0, np.bool_), *(example.is_target for example in examples)]
        )
        labels = [example.labels for example in examples if example.labels is not None]
        segments = [example.token_type_ids for example in examples if example.token_type_ids is not None]
        assert {len(labels), len(segments)} <= {0, len(examples)}, "all examples have labels or segments, or none has"
        self._labels: TokenArray | None = np.concatenate(labels) if labels else None
        self._label_starts = np.cumsum([0, *map(len, labels)])
        self._token_type_ids: TokenArray | None = np.concatenate(segments) if segments else None

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of a dataset with {len(self)}")
        number = index % len(self)
        part = slice(self._starts[number], self._starts[number + 1])
        return Example(
            self._input_ids[part],
            self._is_target[part],
            None if self._labels is None else self._labels[self._label_starts[number] : self._label_starts[number + 1]],
            None if self._token_type_ids is None else self._token_type_ids[part],
        )

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def spread(self, count: int) -> TokenDataset:
        """Return `count` of the examples, from all parts of them, in their order; itself where it holds no more.

        `count` 0 means all.
        """
        if not 0 < count < len(self):
            return self
        return TokenDataset([self[index * len(self) // count] for index in range(count)])

    @property
    def num_input_tokens(self) -> int:
        """Tokens of all examples."""
        return len(self._input_ids)

    @property
    def highest_id(self) -> int:
        """The highest id of all tokens; 0 where there are none."""
        return int(self._input_ids.max(initial=0))

    @property
    def num_target_tokens(self) -> int:
        """What the loss counts in one pass: target tokens, or labels."""
        return int(self._is_target.sum()) if self._labels is None else len(self._labels)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the contents: equal exactly where lengths, tokens, targets, labels and segments are."""
        labels = [] if self._labels is None else [self._label_starts, self._labels]
        segments = [] if self._token_type_ids is None else [self._token_type_ids]
        return _hash(self.lengths, self._input_ids, self._is_target, *labels, *segments)


class TextDataset:
    """Windows over one long run of tokens, for pretraining.

    Item i holds `tokens[i * stride : i * stride + context + 1]`: `context` inputs, and each but the first a target. The
    last one begins sooner where the tokens end before it would, and its targets begin where they would have; windows
    that leave out tokens between them leave out the end too.

    >>> dataset = TextDataset(np.arange(10), context=4)
    >>> len(dataset), dataset[1].input_ids.tolist(), dataset[2].input_ids.tolist()
    (3, [4, 5, 6, 7, 8], [5, 6, 7, 8, 9])
    """

    def __init__(self, tokens: npt.ArrayLike, context: int, stride: int | None = None) -> None:
        """Cut `tokens` into windows of `context` + 1, `stride` apart (default `context`: each token is a target once).

        Raises:
            DataError: The tokens aren't one run of whole numbers, or are fewer than one window.
        """
        found = np.asarray(tokens)
        if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
            raise DataError(
                f"tokens are one run of whole numbers, found {found.dtype} of shape {found.shape}. Give the ids of one "
                "text; several are joined first, with np.concatenate."
            )
        self.tokens: TokenArray = np.ascontiguousarray(found, dtype=np.int32)
        self.context = context
        self.stride = context if stride is None else stride
        if context < 1 or self.stride < 1:
            raise ValueError(f"context and stride are at least 1, found {context} and {self.stride}")
        if len(self.tokens) < context + 1:
            raise DataError(
                f"the text has {len(self.tokens)} tokens, fewer than one window of context + 1 = {context + 1}. "
                "Give more text or a smaller context."
            )

    def __len__(self) -> int:
        full, rest = divmod(self._last_start, self.stride)
        return full + 1 + (rest > 0 and self.stride <= self.context)

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of a dataset with {len(self)}")
        place = (index % len(self)) * self.stride
        start = min(place, self._last_start)
        is_target = np.arange(self.context + 1) > place - start
        return Example(self.tokens[start : start + self.context + 1], is_target)

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    @property
    def num_input_tokens(self) -> int:
        """Tokens that one pass over the windows reads."""
        return len(self) * self.context

    @property
    def num_target_tokens(self) -> int:
        """Tokens that the loss counts, in one pass."""
        return self.num_input_tokens - max(0, (len(self) - 1) * self.stride - self._last_start)

    @property
    def _last_start(self) -> int:
        return len(self.tokens) - self.context - 1

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokens, and of how and into how many windows they are cut."""
        return _hash(np.array([self.context, self.stride, len(self)], dtype=np.int64), self.tokens)


def _hash(*arrays: npt.NDArray[np.generic]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        # Little-endian on every machine, so the same data has the same fingerprint everywhere.
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()
