"""Questions about contexts: where an answer stands, in windows where a context is long, and the answer read back.

The two targets of a window are the positions of the answer's first and last token; position 0 stands for none. The
question is never cut. An answer that is read back is cut out of the context by characters, never decoded from tokens.

Legend: `T` positions of a window, `K` tokens of its context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from smolora.data.encoding import encode_with_template
from smolora.data.preprocessor import DataPreprocessor, Values, render_runs
from smolora.data.task_rows import read_answers
from smolora.data.token_dataset import Example, TokenArray
from smolora.errors import DataError

Scores = npt.NDArray[np.float32] | npt.NDArray[np.float64]

LONGEST_ANSWER = 30
"""Tokens; as in BERT's own reading of SQuAD."""


@dataclass(frozen=True)
class Window:
    """A question with a part of its context, or all of it."""

    example: Example
    offsets: TokenArray
    """[T, 2]: the characters of the context that each position stands for; empty (equal) outside of the context."""


@dataclass(frozen=True)
class SpanAnswer:
    """The best answer to a question in its context."""

    text: str
    start: int
    """Its first character in the context."""
    score: float
    """Logit of its first token, and of its last one, added."""
    null_score: float
    """The same of position 0, in the window that says the least for it: above `score`, there is rather no answer."""


class QuestionAnsweringPreprocessor(DataPreprocessor):
    """Encodes a question and its context, in the tokenizer's own template of a pair, with the place of an answer."""

    kinds = ("qa",)
    splits = True

    def encode(self, rows: Sequence[Values]) -> list[Example]:
        """Encode rows, one example per row, of any length; of several answers the first is learned.

        Raises:
            DataError: The tokenizer leaves nothing of an answer, or puts nothing before a context.
        """
        return [window.example for window in self._encode(rows)]

    def cut(self, example: Example, row: Values, limit: int) -> list[Example]:
        """Return windows of at most `limit` tokens over the context.

        Raises:
            DataError: The question leaves no room for a context, or none to go on by.
        """
        return [_take(example, places) for places in self._cut(example, limit)]

    def encode_windows(self, row: Values, limit: int | None) -> list[Window]:
        """Return the windows of one row with the characters of their tokens, to read an answer back.

        Raises:
            DataError: As `encode` and `cut`.
        """
        (whole,) = self._encode([row])
        if limit is None or len(whole.example) <= limit:
            return [whole]
        parts = self._cut(whole.example, limit)
        return [Window(_take(whole.example, places), whole.offsets[places]) for places in parts]

    def render(self, example: Example) -> list[tuple[str, bool]]:
        """Return the question and its context; what is learned is the answer, or position 0."""
        first, last = _labels_of(example)
        flags = [first <= place <= last for place in range(len(example))]
        return render_runs(example.input_ids.tolist(), flags, self.tokenizer)

    def _encode(self, rows: Sequence[Values]) -> list[Window]:
        columns = self.fmt.columns
        questions, contexts = ([str(row[columns[role]]) for row in rows] for role in ("question", "context"))
        encoded = encode_with_template(questions, self.tokenizer, contexts, with_offsets=True)
        segments = encoded.get("token_type_ids")
        windows = []
        for number, row in enumerate(rows):
            is_context = np.array([part == 1 for part in encoded.sequence_ids(number)], np.bool_)
            if is_context[:1].any():
                raise DataError("the question has no token, and nothing stands before the context: ask something")
            offsets = np.asarray(encoded["offset_mapping"][number], np.int32) * is_context[:, None]
            labels = _find_labels(offsets, read_answers(row[columns["answers"]]) or [])
            is_context[:1] = True  # Where no answer stands for itself.
            ids = np.asarray(encoded["input_ids"][number], np.int32)
            types = None if segments is None else np.asarray(segments[number], np.int32)
            windows.append(Window(Example(ids, is_context, np.asarray(labels, np.int32), types), offsets))
        return windows

    def _cut(self, example: Example, limit: int) -> Iterator[npt.NDArray[np.int64]]:
        """Yield the positions of the whole example that each window takes."""
        context = np.flatnonzero(example.is_target)[1:]
        around = len(example) - len(context)
        room = limit - around
        stride = room // 4 if self.stride is None else self.stride
        if room < 1:
            raise DataError(
                f"the question takes {around} of {limit} tokens, with nothing left for its context, and it is never cut"
            )
        if stride >= room:
            raise DataError(
                f"data.stride={stride}, but a window beside this question holds {room} tokens of the context, so no "
                f"window would go on. Allowed: up to {room - 1}, or leave it out."
            )
        before, behind = np.arange(context[0]), np.arange(context[-1] + 1, len(example))
        for start in range(0, max(1, len(context) - stride), room - stride):
            yield np.concatenate([before, context[start : start + room], behind])


def find_answer(
    context: str, windows: Sequence[Window], logits: Sequence[tuple[Scores, Scores]], *, longest: int = LONGEST_ANSWER
) -> SpanAnswer:
    """Return the best answer over all windows of a question: the highest sum of a first and a last token's logits.

    Args:
        context: The text that the windows are of.
        windows: From `encode_windows`.
        logits: For each window, [T] of where the answer begins and [T] of where it ends; more positions are padding.
        longest: Tokens of an answer at most.

    The last token is never before the first. Of equal sums the first window's earliest and shortest answer is taken.
    Where a context has no token at all the answer is empty, with a score of -inf.
    """
    best, null_score = SpanAnswer("", 0, float("-inf"), float("inf")), float("inf")
    for window, (starts, ends) in zip(windows, logits, strict=True):
        null_score = min(null_score, float(starts[0]) + float(ends[0]))
        places = np.flatnonzero([bool(context[start:end].strip()) for start, end in window.offsets])
        if not len(places):
            continue
        sums = starts[places].astype(np.float64)[:, None] + ends[places].astype(np.float64)  # [K, K]
        tokens_more = places - places[:, None]  # [K, K], behind the first token; those of white space alone count too.
        sums[(tokens_more < 0) | (tokens_more >= longest)] = -np.inf
        first, last = divmod(int(sums.argmax()), len(places))
        if sums[first, last] > best.score:
            start, end = int(window.offsets[places[first], 0]), int(window.offsets[places[last], 1])
            text = context[start:end]
            start += len(text) - len(text.lstrip())  # Some tokens stand for the space before them too.
            best = SpanAnswer(text.strip(), start, float(sums[first, last]), null_score)
    return SpanAnswer(best.text, best.start, best.score, null_score)


def _find_labels(offsets: TokenArray, answers: Sequence[tuple[str, int]]) -> tuple[int, int]:
    """Return the positions of the first and the last token of the first answer; (0, 0) where there is none."""
    if not answers:
        return 0, 0
    text, start = answers[0]
    end = start + len(text)
    overlapping = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < end) & (offsets[:, 1] > offsets[:, 0]))
    if not len(overlapping):
        raise DataError(f"the tokenizer leaves nothing of the answer {text!r}")
    return int(overlapping[0]), int(overlapping[-1])


def _take(example: Example, places: npt.NDArray[np.int64]) -> Example:
    """Return the example of some positions; an answer that isn't whole among them is none."""
    first, last = np.searchsorted(places, _labels_of(example)).tolist()
    is_whole = last < len(places) and (places[first], places[last]) == _labels_of(example)
    types = example.token_type_ids
    return Example(
        example.input_ids[places],
        example.is_target[places],
        np.array([first, last] if is_whole else [0, 0], np.int32),
        None if types is None else types[places],
    )


def _labels_of(example: Example) -> tuple[int, int]:
    assert example.labels is not None, "questions have an answer, or position 0"
    first, last = example.labels.tolist()
    return first, last
