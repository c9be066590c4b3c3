"""What a task does with a row: which forms it takes, how a row becomes an example, how that is cut and shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Self

from smolora.data.encoding import decode_ids, encode_pairs
from smolora.data.pieces import goes_on
from smolora.data.prompts import Kind, PromptFormat, encode_row, render_pair
from smolora.data.token_dataset import Example
from smolora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Values = Mapping[str, object]


class DataPreprocessor:
    """Encodes rows for a causal language model: any form, and what the form says is learned."""

    kinds: ClassVar[tuple[Kind, ...]] = ("text", "prompt_completion", "instruction", "messages")

    splits: ClassVar[bool] = False
    """Whether a row that is too long becomes several examples, whatever data.overlong says."""

    def __init__(self, fmt: PromptFormat, tokenizer: PreTrainedTokenizerBase, *, stride: int | None = None) -> None:
        """Take rows of one form; of a task that `splits`, parts that follow each other share `stride` tokens.

        Raises:
            DataError: The task has no use for rows of this form.
        """
        if fmt.kind not in self.kinds:
            raise DataError(
                f"rows of the form {fmt.describe()} don't fit this task. It takes: {', '.join(self.kinds)}."
            )
        self.fmt = fmt
        self.tokenizer = tokenizer
        self.stride = stride

    def with_format(self, fmt: PromptFormat, tokenizer: PreTrainedTokenizerBase) -> Self:
        """Return the same preprocessor for rows of another form.

        Raises:
            DataError: The task has no use for rows of this form.
        """
        changed = copy(self)
        DataPreprocessor.__init__(changed, fmt, tokenizer, stride=self.stride)
        return changed

    def encode(self, rows: Sequence[Values]) -> list[Example]:
        """Encode rows, one example per row, of any length; a piece of text that goes on isn't ended.

        Raises:
            DataError: A row doesn't fit the form.
        """
        if self.fmt.kind == "messages":
            return [encode_row(row, self.fmt, self.tokenizer) for row in rows]
        pairs = [render_pair(row, self.fmt) for row in rows]
        examples = encode_pairs(pairs, self.tokenizer, end_token=self.fmt.end_token)
        if self.fmt.kind != "text":
            return examples
        return [
            _cut(example, len(example) - 1) if goes_on(row) else example
            for row, example in zip(rows, examples, strict=True)
        ]

    def measure(self, example: Example) -> int:
        """Return the tokens that count against the longest length."""
        return len(example)

    def cut(self, example: Example, row: Values, limit: int) -> list[Example]:
        """Return what becomes of a row that is longer than `limit` tokens: here its beginning."""
        return [_cut(example, limit)]

    def render(self, example: Example) -> list[tuple[str, bool]]:
        """Return an example as text in runs, each with whether it is learned."""
        return render_marked(example, self.tokenizer)


class InstructionPreprocessor(DataPreprocessor):
    """Encodes rows that ask for something, of which only the answer is learned."""

    kinds = ("prompt_completion", "instruction", "messages")


def _cut(example: Example, length: int) -> Example:
    return replace(example, input_ids=example.input_ids[:length], is_target=example.is_target[:length])


def render_marked(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Return the text of an example in runs, each with whether it is learned; joined, they are the decoded example."""
    return render_runs(example.input_ids.tolist(), example.is_target.tolist(), tokenizer)


def render_runs(
    ids: Sequence[int], flags: Sequence[bool], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, bool]]:
    """Return the text of tokens in runs of the same flag; joined, they are the decoded tokens."""
    ends = [index for index in range(1, len(ids)) if flags[index] != flags[index - 1]] + [len(ids)]
    spans, start, before = [], 0, ""
    for end in ends:
        # A run is what it adds to the text so far: decoded alone, SentencePiece would lose its first space.
        text = decode_ids(ids[:end], tokenizer)
        spans.append(
            (text[len(before) :] if text.startswith(before) else decode_ids(ids[start:end], tokenizer), flags[start])
        )
        start, before = end, text
    return spans
