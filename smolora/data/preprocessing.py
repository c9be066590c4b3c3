"""Rows to encoded examples, with the choices about rows that are too long or have nothing to learn.

A preprocessor knows one task: which forms of rows it takes and how they become examples. Lengths, drops and counts are
the same for every task and live in `encode_rows`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from smolora.config.data import DataConfig
from smolora.data.encoding import decode_ids, encode_pairs
from smolora.data.ledger import DataReport, EncodingCounts
from smolora.data.prompts import Kind, PromptFormat, encode_row, render_pair
from smolora.data.rows import Row
from smolora.data.token_dataset import Example, TokenDataset
from smolora.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Side = Literal["train", "validation"]

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 1000


class DataPreprocessor:
    """Encodes rows for a causal language model: any form, and what the form says is learned."""

    kinds: ClassVar[tuple[Kind, ...]] = ("text", "prompt_completion", "instruction", "messages")

    def __init__(self, fmt: PromptFormat, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take rows of one form.

        Raises:
            DataError: The task has no use for rows of this form.
        """
        if fmt.kind not in self.kinds:
            raise DataError(
                f"rows of the form {fmt.describe()} don't fit this task. It takes: {', '.join(self.kinds)}."
            )
        self.fmt = fmt
        self.tokenizer = tokenizer

    def encode(self, rows: Sequence[Mapping[str, object]]) -> list[Example]:
        """Encode rows, one example per row, of any length.

        Raises:
            DataError: A row doesn't fit the form.
        """
        if self.fmt.kind == "messages":
            return [encode_row(row, self.fmt, self.tokenizer) for row in rows]
        pairs = [render_pair(row, self.fmt) for row in rows]
        return encode_pairs(pairs, self.tokenizer, end_token=self.fmt.end_token)


class InstructionPreprocessor(DataPreprocessor):
    """Encodes rows that ask for something, of which only the answer is learned."""

    kinds = ("prompt_completion", "instruction", "messages")


_PREPROCESSORS: dict[str, type[DataPreprocessor]] = {
    "causal_lm": DataPreprocessor,
    "instruction": InstructionPreprocessor,
}


def get_preprocessor(task: str, *, fmt: PromptFormat, tokenizer: PreTrainedTokenizerBase) -> DataPreprocessor:
    """Return the preprocessor of a task.

    Raises:
        ConfigError: There is no such task.
    """
    if task not in _PREPROCESSORS:
        raise ConfigError(f"no task {task!r}.{did_you_mean(task, _PREPROCESSORS)} Tasks: {', '.join(_PREPROCESSORS)}.")
    return _PREPROCESSORS[task](fmt, tokenizer)


def encode_rows(
    rows: Sequence[Row],
    fmt: PromptFormat,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: DataConfig,
    context: int | None,
    report: DataReport,
    side: Side = "train",
    preprocessor: DataPreprocessor | None = None,
) -> TokenDataset:
    """Encode rows within the longest length, and count in `report` what was cut and dropped.

    Args:
        rows: What to encode.
        fmt: Their form.
        tokenizer: The model's.
        data: `max_length` (left out: `context`) and `overlong`.
        context: The model's longest sequence in tokens; None where it has no limit.
        report: Gets the counts.
        side: Which counts of the report.
        preprocessor: The task's; a causal language model's where left out.

    Raises:
        DataError: An example is too long and overlong=raise, or nothing is left to learn.
        ConfigError: `max_length` is past the context.
    """
    limit = _resolve_limit(data, context)
    counts = report.encoding(side)
    counts.rows += len(rows)
    kept = []
    for row, example in _iter_examples(rows, preprocessor or DataPreprocessor(fmt, tokenizer)):
        fitted = _fit(example, row, limit, data, counts)
        if fitted is not None:
            kept.append(fitted)
            counts.examples += 1
            counts.input_tokens += len(fitted)
            counts.target_tokens += fitted.num_target_tokens
    report.check()
    if rows and not kept:
        logger.info("%s", report.describe())
        raise DataError(
            f"none of the {len(rows):,} {side} rows is left with a token to learn: "
            f"{_explain_nothing_left(counts, limit, data, context)}"
        )
    return TokenDataset(kept)


def _explain_nothing_left(counts: EncodingCounts, limit: int | None, data: DataConfig, context: int | None) -> str:
    """Return why, with the limit, and what to change."""
    place = f"{limit} tokens ({'the context of the model' if data.max_length is None else 'data.max_length'})"
    reasons, changes = [], []
    if data.max_length is not None and data.max_length != context:
        changes.append(f"raise data.max_length{f' (up to {context})' if context is not None else ''}")
    if counts.dropped_overlong:
        reasons.append(f"{counts.dropped_overlong:,} are longer than {place} and were dropped")
        changes.append("cut them with --overlong truncate (data.overlong=truncate)")
    if counts.dropped_without_target:
        within = "" if limit is None else f" within {place}"
        reasons.append(f"{counts.dropped_without_target:,} have nothing to learn{within}")
        changes.append("give rows whose answer begins earlier" if limit is not None else "give rows with an answer")
    advice = ", or ".join(changes)
    return f"{' and '.join(reasons)}. {advice[0].upper()}{advice[1:]}."


def render_marked(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Return the text of an example in runs, each with whether it is learned; joined, they are the decoded example."""
    ids, flags = example.input_ids.tolist(), example.is_target.tolist()
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


def _resolve_limit(data: DataConfig, context: int | None) -> int | None:
    if data.max_length is not None and context is not None and data.max_length > context:
        raise ConfigError(
            f"data.max_length={data.max_length} is past the model's context of {context} tokens. "
            f"Allowed: up to {context}, or leave it out."
        )
    return data.max_length or context


def _iter_examples(rows: Sequence[Row], preprocessor: DataPreprocessor) -> Iterator[tuple[Row, Example]]:
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = rows[start : start + _ROWS_AT_ONCE]
        try:
            examples = preprocessor.encode([row.values for row in part])
        except DataError:
            examples = [_encode_one(row, preprocessor) for row in part]  # Again one by one, to name the row.
        yield from zip(part, examples, strict=True)


def _encode_one(row: Row, preprocessor: DataPreprocessor) -> Example:
    try:
        return preprocessor.encode([row.values])[0]
    except DataError as error:
        raise DataError(f"{row.origin}: {error}") from error


def _fit(example: Example, row: Row, limit: int | None, data: DataConfig, counts: EncodingCounts) -> Example | None:
    """Return the example within the limit, or None where it is dropped; count what happened."""
    if limit is not None and len(example) > limit:
        if data.overlong == "raise":
            raise DataError(
                f"{row.origin} becomes {len(example)} tokens, but the longest allowed is {limit}. Choose with "
                "--overlong: truncate (cut the end and report what was lost) or drop; or raise --max-length where the "
                "model allows it."
            )
        if data.overlong == "drop":
            counts.dropped_overlong += 1
            return None
        counts.cut_target_tokens += int(example.is_target[limit:].sum())
        example = Example(example.input_ids[:limit], example.is_target[:limit])
        if example.num_target_tokens:
            counts.truncated += 1
    if not example.num_target_tokens:
        counts.dropped_without_target += 1
        return None
    return example
