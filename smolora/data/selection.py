"""From what was read to what is used: rejects, empty rows, cleaning, chunks, duplicates, held-out rows; all counted."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smolora.config.data import DataConfig
from smolora.data.chat import check_messages
from smolora.data.cleaning import TextCleaningProcessor
from smolora.data.ledger import DataReport
from smolora.data.pipeline import chunk_texts
from smolora.data.prompts import PromptFormat
from smolora.data.rows import Reject, Row
from smolora.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FEWEST_ROWS_TO_SPLIT = 50
"""Below this many rows none is held out: too few to measure on, and too many to miss."""


@dataclass
class RowSelection:
    """The steps that every row of a run goes through."""

    fmt: PromptFormat
    data: DataConfig
    report: DataReport
    chunk_tokenizer: PreTrainedTokenizerBase | None = None

    def select(self, read: Iterable[Row | Reject]) -> list[Row]:
        """Return the usable rows, cleaned, chunked and without duplicates; the report counts the others."""
        rows = self._chunk(self._accept(read))
        return self._deduplicate(rows) if self.data.deduplicate else rows

    def _accept(self, read: Iterable[Row | Reject]) -> list[Row]:
        clean = TextCleaningProcessor.from_names(self.data.clean).clean if self.data.clean else None
        accepted = []
        for found in read:
            self.report.files[found.file] += 1
            checked = found if isinstance(found, Reject) else self._check(found, clean)
            if isinstance(checked, Reject):
                self.report.rejects.append(checked)
            elif is_empty(checked, self.fmt):
                self.report.empty += 1
            else:
                accepted.append(checked)
        return accepted

    def _check(self, row: Row, clean: Callable[[str], str] | None) -> Row | Reject:
        problem = find_problem(row, self.fmt)
        if problem is not None:
            return Reject(row.file, row.line, problem)
        if clean is None:
            return row
        texts = {column: row.values.get(column) for column in self.fmt.columns.values()}
        cleaned = {column: clean(text) for column, text in texts.items() if isinstance(text, str)}
        return Row({**row.values, **cleaned}, row.file, row.line)

    def _chunk(self, rows: list[Row]) -> list[Row]:
        if not self.data.chunk_size:
            return rows
        if self.fmt.kind != "text":
            raise ConfigError(
                f"data.chunk_size splits plain text, but these rows are {self.fmt.kind}: "
                "a piece of a prompt or of a completion is no row. Set data.chunk_size=0, or data.text_field."
            )
        column = self.fmt.columns["text"]
        pieces = [
            Row({**row.values, column: piece}, row.file, row.line)
            for row in rows
            for piece in chunk_texts([str(row.values[column])], self.data.chunk_size, tokenizer=self.chunk_tokenizer)
        ]
        self.report.added_by_chunking += len(pieces) - len(rows)
        return pieces

    def _deduplicate(self, rows: list[Row]) -> list[Row]:
        """Keep the first of equal rows; rows are equal where the columns of their form are."""
        first: dict[str, Row] = {}
        for row in rows:
            first.setdefault(self.key(row), row)
        self.report.duplicate += len(rows) - len(first)
        return list(first.values())

    def key(self, row: Row) -> str:
        """Return what makes two rows equal."""
        return json.dumps([row.values.get(column) for column in self.fmt.columns.values()], sort_keys=True, default=str)


def find_problem(row: Row, fmt: PromptFormat) -> str | None:
    """Return why a row doesn't fit its form, or None; a blank row has no problem, it is empty."""
    if not row.values:
        return None
    for role, column in fmt.columns.items():
        if role == "messages":
            return _find_message_problem(row.values.get(column))
        if column not in row.values and role != "input":
            return f"no column {column!r}; found {', '.join(map(repr, row.values))}"
        value = row.values.get(column)
        if value is not None and not isinstance(value, str):
            return f"column {column!r} must hold text, found {type(value).__name__} {value!r}"[:200]
    return None


def _find_message_problem(value: object) -> str | None:
    try:
        check_messages(value)
    except DataError as error:
        return str(error)
    return None


def is_empty(row: Row, fmt: PromptFormat) -> bool:
    """Whether a row lacks text where its form needs some (an instruction's input may be empty)."""
    if fmt.kind == "messages":
        return not row.values
    texts = (row.values.get(column) for role, column in fmt.columns.items() if role != "input")
    return any(text is None or not str(text).strip() for text in texts)


def split_validation(rows: Sequence[Row], data: DataConfig, *, seed: int) -> tuple[list[Row], list[Row]]:
    """Return the rows to learn from and those held out: min(validation_fraction, max_validation_rows), none below 50.

    The choice depends on the seed and the number of rows only; both keep the order of `rows`.
    """
    if len(rows) < FEWEST_ROWS_TO_SPLIT:
        return list(rows), []
    count = min(int(len(rows) * data.validation_fraction), data.max_validation_rows)
    chosen = set(random.Random(seed).sample(range(len(rows)), count))
    return (
        [row for index, row in enumerate(rows) if index not in chosen],
        [row for index, row in enumerate(rows) if index in chosen],
    )
