"""A row's answer after the prompt of another row: what a model that reads its prompts must hold less likely.

Of a question about a context, the prompt is the question: the answer is a place in the context, which stays.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import numpy as np

from smolora.data.token_dataset import Example, TokenArray
from smolora.models.bundle import ModelBundle

_MOST_TRIES = 32


class PromptSwapper:
    """Gives answers of rows to the prompts of others, which have another answer."""

    def __init__(self, examples: Sequence[Example], bundle: ModelBundle) -> None:
        self._examples = examples
        self._task, self._context = bundle.task, bundle.context
        self._about: dict[bytes, list[int]] = defaultdict(list)
        """The questions about each context."""
        for index, example in enumerate(examples if self._task == "qa" else ()):
            self._about[_split_question(example)[1].tobytes()].append(index)

    def swap(self, index: int) -> Example | None:
        """Return the answer of row `index` after another prompt; None where no other row has one for it.

        A label belongs to its own text alone, so a row with labels has no such mate; the answer of an encoder-decoder
        is no label, and that to a question has the other questions about the same context.
        """
        row = self._examples[index]
        if self._task == "qa":
            return self._swap_question(index)
        if row.labels is not None and self._task != "seq2seq":
            return None
        for offset in range(1, min(len(self._examples), _MOST_TRIES)):
            other = self._examples[(index + offset) % len(self._examples)]
            (prompt, answer), (other_prompt, other_answer) = _split(row), _split(other)
            if len(other_prompt) < 2 or np.array_equal(prompt, other_prompt) or np.array_equal(answer, other_answer):
                continue
            if row.labels is not None:
                return replace(other, labels=row.labels)
            if self._fits(len(other_prompt) + len(answer)):
                is_target = np.concatenate([np.zeros(len(other_prompt), np.bool_), row.is_target[len(prompt) :]])
                return Example(np.concatenate([other_prompt, answer]), is_target)
        return None

    def _swap_question(self, index: int) -> Example | None:
        row = self._examples[index]
        question, context, place = _split_question(row)
        if place is None:  # No answer is right after another question too.
            return None
        for mate in islice(self._about[context.tobytes()], _MOST_TRIES):
            other = self._examples[mate]
            other_question, _, other_place = _split_question(other)
            if np.array_equal(question, other_question) or place == other_place or not self._fits(len(other)):
                continue
            assert row.labels is not None, "questions have an answer, or position 0"
            return replace(other, labels=row.labels + np.int32(len(other_question) - len(question)))
        return None

    def _fits(self, length: int) -> bool:
        return self._context is None or length <= self._context


def _split(example: Example) -> tuple[TokenArray, TokenArray]:
    """Return the prompt and the answer."""
    if example.labels is not None:
        return example.input_ids, example.labels
    start = int(example.is_target.argmax())
    return example.input_ids[:start], example.input_ids[start:]


def _split_question(example: Example) -> tuple[TokenArray, TokenArray, tuple[int, int] | None]:
    """Return the question, the context, and where in the context the answer is; None where there is none."""
    places = np.flatnonzero(example.is_target)[1:]  # Position 0 stands for no answer.
    start = int(places[0]) if len(places) else len(example)
    assert example.labels is not None, "questions have an answer, or position 0"
    first, last = example.labels.tolist()
    return example.input_ids[:start], example.input_ids[start:], (first - start, last - start) if last else None
