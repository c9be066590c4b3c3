"""A raw record, the record that could not be one, both with the place they came from, and their columns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from smolora.data.encoding import find_surrogate
from smolora.errors import DataError, did_you_mean

Values = Mapping[str, object]


class Row(NamedTuple):
    """A raw record; `line` counts from 1 (records of a file without lines are counted alike)."""

    values: Values
    file: str
    line: int

    @property
    def origin(self) -> str:
        """Where the row came from, as `file:line`."""
        return f"{self.file}:{self.line}"


class Reject(NamedTuple):
    """A record that can't be used, and why."""

    file: str
    line: int
    reason: str


def check_values(values: Values, file: str, line: int) -> Row | Reject:
    """Return the row, or a reject where a value holds NUL, half of a surrogate pair, or bytes of no UTF-8."""
    for name, value in values.items():
        if isinstance(value, str):
            if value.isascii() and "\0" not in value:
                continue
            text = value
        elif isinstance(value, int | float | None):
            continue
        else:
            text = _join_texts(value)
        if problem := find_broken_character(text):
            return Reject(file, line, f"column {name!r}, {problem}")
    return Row(values, file, line)


def _join_texts(value: object) -> str:
    """Return a list or an object as one text, in which NUL is the character again, and not its escape."""
    return json.dumps(value, ensure_ascii=False, default=str).replace(r"\\", "").replace(r"\u0000", "\0")


def find_broken_character(text: str) -> str | None:
    """Return where text has NUL or half of a surrogate pair and what that is; None where it has neither.

    Undecodable bytes arrive as U+DC80 to U+DCFF, by Python's surrogateescape.
    """
    if "\0" in text:
        return f"character {text.index(chr(0))}: U+0000 is in no text (if the file is UTF-16, save it as UTF-8)"
    if (half := find_surrogate(text)) is None:
        return None
    code = ord(text[half])
    if not 0xDC80 <= code <= 0xDCFF:
        return f"character {half}: U+{code:04X} is half a pair"
    return (
        f"character {half}: byte 0x{code - 0xDC00:02x} is no UTF-8 (if the file is in another encoding, save it as "
        "UTF-8)"
    )


def list_columns(rows: Iterable[Row | Reject]) -> list[str]:
    """Return the columns of all rows, in the order they first appear."""
    columns: dict[str, None] = {}
    for row in rows:
        if isinstance(row, Row):
            columns.update(dict.fromkeys(row.values))
    return list(columns)


def match_column(name: str, columns: Sequence[str]) -> str | None:
    """Return the column called `name`, exactly or but for case; None where there is none.

    Raises:
        DataError: Several columns differ from `name` only by case.
    """
    if name in columns:
        return name
    matches = [column for column in columns if column.casefold() == name.casefold()]
    if len(matches) > 1:
        raise DataError(f"the columns {', '.join(map(repr, matches))} differ only by case; spell the one you mean.")
    return matches[0] if matches else None


def find_column(name: str, columns: Sequence[str]) -> str:
    """Return the column called `name`, exactly or but for case.

    Raises:
        DataError: There is none.
    """
    found = match_column(name, columns)
    if found is None:
        listed = ", ".join(map(repr, columns)) or "(none)"
        raise DataError(f"no column {name!r}.{did_you_mean(name, columns)} Columns found: {listed}.")
    return found
