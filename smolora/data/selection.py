"""From what was read to what is used: rejects, empty rows, cleaning, chunks, duplicates, held-out rows; all counted."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from smolora.config.data import DataConfig
from smolora.data.chat import read_sharegpt
from smolora.data.cleaning import TextCleaningProcessor
from smolora.data.ledger import DataReport
from smolora.data.pieces import count_added_tokens, split_row
from smolora.data.prompts import PromptFormat, read_conversation, reduce_to_taught
from smolora.data.rows import Reject, Row, Values
from smolora.data.task_rows import find_answer_problem, find_label_problem, find_tags_problem
from smolora.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FEWEST_ROWS_TO_SPLIT = 50
"""Below this many rows none is held out: too few to measure on, and too many to miss."""

_LONG_WORD = 15
"""Characters of a word, with the white space behind it, that a text of a language with spaces never has on average."""


@dataclass
class RowSelection:
    """The steps that every row of a run goes through."""

    fmt: PromptFormat
    data: DataConfig
    report: DataReport
    chunk_tokenizer: PreTrainedTokenizerBase | None = None
    _is_hint_given: bool = False

    def select(self, read: Iterable[Row | Reject], seen: set[bytes]) -> Iterator[Row]:
        """Yield the usable rows, cleaned, chunked and without duplicates; the report counts the others.

        Args:
            read: What was read.
            seen: Gets the digest of every row that is yielded. Rows whose digest it holds are duplicates.
        """
        for row in self._chunk(self._accept(read)):
            digest = self.digest(row)
            if digest in seen and self.data.deduplicate:
                self.report.duplicate += 1
            else:
                seen.add(digest)
                yield row

    def leave_out(self, rows: Iterable[Row], held_out: Set[bytes]) -> Iterator[Row]:
        """Yield the rows whose digest isn't among `held_out`, or all where there is no other; a warning says it.

        The report counts those left out.
        """
        copies: list[Row] = []
        kept = 0
        for row in rows:
            if self.digest(row) not in held_out:
                kept += 1
                yield row
            else:
                self.report.also_held_out += 1
                copies += [] if kept else [row]
        count = self.report.also_held_out
        if kept and count:
            share = f"{count:,} of {count + kept:,} rows to learn from ({100 * count / (count + kept):.1f} %)"
            logger.warning("%s %s left out: the held-out rows hold the same.", share, "is" if count == 1 else "are")
        elif count:
            logger.warning("all that is learned from is held out too: a low held-out loss proves nothing.")
            self.report.also_held_out = 0
            yield from copies

    def _accept(self, read: Iterable[Row | Reject]) -> Iterator[Row]:
        clean = TextCleaningProcessor.from_names(self.data.clean).clean if self.data.clean else None
        for found in read:
            self.report.files[found.file] += 1
            checked = found if isinstance(found, Reject) else self._check(found, clean)
            if isinstance(checked, Reject):
                self.report.rejects.append(checked)
            elif is_empty(checked, self.fmt):
                self.report.empty += 1
            else:
                yield checked

    def _check(self, row: Row, clean: Callable[[str], str] | None) -> Row | Reject:
        if self.fmt.kind == "messages":
            column = self.fmt.columns["messages"]
            turns = row.values.get(column)
            if (messages := read_sharegpt(turns)) is not turns:
                row = Row({**row.values, column: messages}, row.file, row.line)
        if clean is not None:
            columns = [column for role, column in self.fmt.columns.items() if role != "tools" and column in row.values]
            cleaned = {column: _clean(row.values[column], clean) for column in columns}
            row = Row({**row.values, **cleaned}, row.file, row.line)
        problem = find_problem(row, self.fmt)
        return row if problem is None else Reject(row.file, row.line, problem)

    def _chunk(self, rows: Iterator[Row]) -> Iterator[Row]:
        if not self.data.chunk_size:
            return rows
        if self.fmt.kind != "text":
            raise ConfigError(
                f"data.chunk_size splits plain text, but these rows are {self.fmt.kind}: "
                "a piece of a prompt or of a completion is no row. Set data.chunk_size=0, or data.text_field."
            )
        return (piece for row in rows for piece in self._split(row))

    def _split(self, row: Row) -> list[Row]:
        column = self.fmt.columns["text"]
        pieces = split_row(row, column, self._piece_size, self.chunk_tokenizer)
        self.report.added_by_chunking += len(pieces) - 1
        if self.chunk_tokenizer is None and not self._is_hint_given:
            self._hint_at_tokens(row, max(len(str(piece.values[column])) for piece in pieces))
        return pieces

    def _hint_at_tokens(self, row: Row, length: int) -> None:
        """Say, once, what else counts the length of a text whose words white space doesn't part."""
        if length > _LONG_WORD * self.data.chunk_size:
            self._is_hint_given = True
            logger.warning(
                "%s: a piece has %s characters, as data.chunk_size counts what white space parts and a text without "
                "spaces is one word. Count tokens: data.chunk_tokenizer=MODEL.",
                row.origin,
                f"{length:,}",
            )

    @cached_property
    def _piece_size(self) -> int:
        """The words or tokens of a text that make a piece; what a row gets beside them counts as tokens too."""
        if self.chunk_tokenizer is None:
            return self.data.chunk_size
        return max(1, self.data.chunk_size - count_added_tokens(self.chunk_tokenizer))

    def digest(self, row: Row) -> bytes:
        """Return 16 bytes that equal rows share and others don't; equal is what teaches the same."""
        parts = [
            # Most values are such a text, and a call the less for each counts here.
            value.encode()
            if isinstance(value := row.values.get(column), str) and not value.isspace()
            else _to_bytes(reduce_to_taught(value, role, self.fmt))
            for role, column in self.fmt.columns.items()
        ]
        return hashlib.blake2b(b"\xff".join(parts), digest_size=16).digest()


_encode = json.JSONEncoder(sort_keys=True, default=str).encode


def _to_bytes(taught: object) -> bytes:
    """Return bytes that no other value has, and in which 0xff doesn't occur."""
    return b"\xfe" + _encode(taught).encode() if taught != "" else b""


def _clean(value: object, clean: Callable[[str], str]) -> object:
    """Return a text cleaned, and turns of a conversation with their content cleaned; anything else as it is."""
    if isinstance(value, str):
        return clean(value)
    if not isinstance(value, Sequence):
        return value
    return [
        {**turn, "content": _clean(turn.get("content"), clean)} if isinstance(turn, Mapping) else turn for turn in value
    ]


def find_problem(row: Row, fmt: PromptFormat) -> str | None:
    """Return why a row doesn't fit its form, or None; a blank row has no problem, it is empty."""
    if not row.values:
        return None
    for role, column in fmt.columns.items():
        if role == "messages":
            return _find_message_problem(row, fmt)
        if column not in row.values and role != "input":
            return f"no column {column!r}; found {', '.join(map(repr, row.values))}"
        value = row.values.get(column)
        if role in _NO_TEXT:
            if problem := _NO_TEXT[role](row.values, fmt.columns):
                return f"column {column!r}: {problem}"
        elif value is not None and not isinstance(value, str):
            return f"column {column!r} must hold text, found {type(value).__name__} {value!r}"[:200]
    return None


_NO_TEXT: dict[str, Callable[[Values, Mapping[str, str]], str | None]] = {
    "label": lambda values, columns: find_label_problem(values[columns["label"]]),
    "tokens": lambda values, columns: find_tags_problem(values[columns["tokens"]], values.get(columns["tags"])),
    "tags": lambda values, columns: None,  # Said with the words.
    "answers": lambda values, columns: find_answer_problem(values[columns["context"]], values[columns["answers"]]),
}
"""What is wrong with the values of roles that aren't plain text."""


def _find_message_problem(row: Row, fmt: PromptFormat) -> str | None:
    try:
        read_conversation(row.values, fmt)
    except DataError as error:
        return str(error)
    return None


def is_empty(row: Row, fmt: PromptFormat) -> bool:
    """Whether a row lacks text where its form needs some (an instruction's input may be empty)."""
    if fmt.kind == "messages" or not row.values:
        return not row.values
    for role, column in fmt.columns.items():
        if role not in _MAY_BE_EMPTY:
            text = row.values.get(column)
            if not text or str(text).isspace():
                return True
    return False


_MAY_BE_EMPTY = ("input", "label", "answers")
"""An instruction's input, and what is rejected where it is missing: a label may be 0, and a question unanswerable."""


def choose_held_out(num_rows: int, data: DataConfig, *, seed: int) -> set[int]:
    """Return the indices of the rows to hold out: min(validation_fraction, max_validation_rows), none below 50.

    The choice depends on the seed and the number of rows only. Where it is none of few, a line says so.
    """
    if 0 < num_rows < FEWEST_ROWS_TO_SPLIT and data.validation_fraction and data.max_validation_rows:
        logger.info(
            "none of %d rows is held out, whatever data.validation_fraction says: fewer than %d are too few to miss "
            "some. Name others with data.eval_source (--eval-data) to measure by.",
            num_rows,
            FEWEST_ROWS_TO_SPLIT,
        )
    return set(random.Random(seed).sample(range(num_rows), count_held_out(num_rows, data)))


def count_held_out(num_rows: int, data: DataConfig) -> int:
    """Return how many of so many rows are held out."""
    if num_rows < FEWEST_ROWS_TO_SPLIT:
        return 0
    return min(int(num_rows * data.validation_fraction), data.max_validation_rows)


def split_validation(rows: Sequence[Row], data: DataConfig, *, seed: int) -> tuple[list[Row], list[Row]]:
    """Return the rows to learn from and those held out, both in the order of `rows`."""
    chosen = choose_held_out(len(rows), data, seed=seed)
    return (
        [row for index, row in enumerate(rows) if index not in chosen],
        [row for index, row in enumerate(rows) if index in chosen],
    )
