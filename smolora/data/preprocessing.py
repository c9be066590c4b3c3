"""Rows to encoded examples, with the choices about rows that are too long or have nothing to learn.

A preprocessor knows one task: which forms of rows it takes and how they become examples. Lengths, drops and counts are
the same for every task and live in `encode_rows`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from smolora.config.data import DataConfig
from smolora.data.classification import TextClassificationPreprocessor
from smolora.data.ledger import DataReport, EncodingCounts
from smolora.data.preprocessor import DataPreprocessor, InstructionPreprocessor
from smolora.data.prompts import PromptFormat
from smolora.data.rows import Row
from smolora.data.seq2seq import Seq2SeqPreprocessor
from smolora.data.spans import QuestionAnsweringPreprocessor
from smolora.data.token_dataset import Example, TokenDataset
from smolora.data.word_labels import TokenClassificationPreprocessor
from smolora.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Side = Literal["train", "validation"]

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 1000


_PREPROCESSORS: dict[str, type[DataPreprocessor]] = {
    "causal_lm": DataPreprocessor,
    "instruction": InstructionPreprocessor,
    "classification": TextClassificationPreprocessor,
    "qa": QuestionAnsweringPreprocessor,
    "token_classification": TokenClassificationPreprocessor,
    "seq2seq": Seq2SeqPreprocessor,
}


def get_preprocessor(
    task: str, *, fmt: PromptFormat, tokenizer: PreTrainedTokenizerBase, stride: int | None = None
) -> DataPreprocessor:
    """Return the preprocessor of a task.

    Args:
        task: What the model is asked.
        fmt: The form of the rows.
        tokenizer: The model's.
        stride: qa: tokens that two windows over a context share; left out, a quarter of those in a window.

    Raises:
        ConfigError: There is no such task.
    """
    if task not in _PREPROCESSORS:
        raise ConfigError(f"no task {task!r}.{did_you_mean(task, _PREPROCESSORS)} Tasks: {', '.join(_PREPROCESSORS)}.")
    return _PREPROCESSORS[task](fmt, tokenizer, stride=stride)


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
    kept: list[Example] = []
    fitting = _Fitting(preprocessor or DataPreprocessor(fmt, tokenizer), limit, data, counts)
    for row, example in _iter_examples(rows, fitting.preprocessor):
        for fitted in fitting.fit(example, row):
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


@dataclass(frozen=True)
class _Fitting:
    """How examples come within the longest length; what happens is counted."""

    preprocessor: DataPreprocessor
    limit: int | None
    data: DataConfig
    counts: EncodingCounts

    def fit(self, example: Example, row: Row) -> list[Example]:
        """Return what is left of an example: itself, a part, several parts, or nothing."""
        length = self.preprocessor.measure(example)
        if self.limit is None or length <= self.limit:
            return self._count_learnable([example])
        if self.preprocessor.splits:
            return self._split(example, row, self.limit)
        if self.data.overlong == "raise":
            is_text = self.preprocessor.fmt.kind == "text"
            or_cut = f"; or learn all of it in pieces: data.chunk_size={self.limit} data.chunk_tokenizer=MODEL"
            raise DataError(
                f"{row.origin} becomes {length} tokens, but the longest allowed is {self.limit}. Choose with "
                "--overlong: truncate (cut the end and report what was lost) or drop; or raise --max-length where the "
                f"model allows it{or_cut if is_text else ''}."
            )
        if self.data.overlong == "drop":
            self.counts.dropped_overlong += 1
            return []
        parts = self.preprocessor.cut(example, row.values, self.limit)
        left = sum(part.num_target_tokens for part in parts)
        self.counts.cut_target_tokens += example.num_target_tokens - left
        self.counts.truncated += bool(left)
        return self._count_learnable(parts)

    def _split(self, example: Example, row: Row, limit: int) -> list[Example]:
        try:
            parts = self.preprocessor.cut(example, row.values, limit)
        except DataError as error:
            if self.data.overlong != "drop":
                raise DataError(
                    f"{row.origin}: {error}. Raise --max-length where the model allows it, or leave such rows out with "
                    "--overlong drop."
                ) from error
            self.counts.dropped_overlong += 1
            return []
        self.counts.added_by_windows += len(parts) - 1
        return parts

    def _count_learnable(self, examples: list[Example]) -> list[Example]:
        learnable = [example for example in examples if example.num_target_tokens]
        self.counts.dropped_without_target += not learnable
        return learnable
