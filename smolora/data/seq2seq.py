"""Prompts to answers for encoder-decoders: the prompt is what the encoder reads, the answer what the decoder writes.

Both are encoded alone, in the tokenizer's own template (T5: text </s>; BART: <s> text </s>), as transformers' examples
do, so no seam is between them. All tokens of an answer are targets, its end token too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from smolora.data.encoding import encode_answers, encode_with_template
from smolora.data.preprocessor import DataPreprocessor, Values, render_runs
from smolora.data.prompts import render_pair
from smolora.data.token_dataset import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Seq2SeqPreprocessor(DataPreprocessor):
    """Encodes prompts and their answers apart; the longest length is that of either."""

    kinds = ("prompt_completion", "instruction")

    def encode(self, rows: Sequence[Values]) -> list[Example]:
        """Encode rows, one example per row, of any length.

        Raises:
            DataError: A row doesn't fit the form.
        """
        return encode_answered([render_pair(row, self.fmt) for row in rows], self.tokenizer)

    def measure(self, example: Example) -> int:
        """Return the tokens of the longer side."""
        return max(len(example), example.num_target_tokens)

    def cut(self, example: Example, row: Values, limit: int) -> list[Example]:
        """Return the beginning of each side that is longer than `limit`."""
        return [cut_sides(example, limit)]

    def render(self, example: Example) -> list[tuple[str, bool]]:
        """Return the prompt, and the answer that is learned."""
        sides = ((example.input_ids, False), (_answer_of(example), True))
        runs = [render_runs(ids.tolist(), [flag] * len(ids), self.tokenizer) for ids, flag in sides]
        return [*runs[0], (" ", False), *runs[1]]


def encode_answered(pairs: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Encode (prompt, answer) pairs for an encoder-decoder.

    Raises:
        DataError: A text can't be encoded.
        ModelError: The tokenizer has no token that ends an answer.
    """
    if not pairs:
        return []
    sources = encode_with_template([prompt for prompt, _ in pairs], tokenizer)["input_ids"]
    answers = encode_answers([answer for _, answer in pairs], tokenizer)
    return [
        Example(np.asarray(source, np.int32), np.zeros(len(source), np.bool_), np.asarray(answer, np.int32))
        for source, answer in zip(sources, answers, strict=True)
    ]


def cut_sides(example: Example, limit: int) -> Example:
    """Return an example with at most `limit` tokens a side.

    A prompt keeps its last token, which is the template's. A cut answer loses its end token: no false end is learned.
    """
    ids = example.input_ids
    if len(ids) > limit:
        ids = np.concatenate([ids[: limit - 1], ids[-1:]])
    return replace(example, input_ids=ids, is_target=np.zeros(len(ids), np.bool_), labels=_answer_of(example)[:limit])


def _answer_of(example: Example) -> np.ndarray:
    assert example.labels is not None, "examples of seq2seq have an answer"
    return example.labels
