"""WikiSQL: queries as the official script holds them, as text that a model writes, and the rows of its files.

A query selects one column, with at most one aggregation, under conditions joined by AND. Columns are numbers; their
names are the table's header.
"""

from __future__ import annotations

import json
import re
import sqlite3
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from smolora.data.benchmark_rows import BenchmarkRow, get_text, iter_values
from smolora.errors import DataError

AGGREGATIONS = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")
OPERATORS = ("=", ">", "<")

Columns = Mapping[int, str]
Condition = tuple[int, int, object]
"""Number of the column, number of the operator, value."""


@dataclass(frozen=True)
class Query:
    """A query in the official form."""

    column: int
    aggregation: int
    conditions: tuple[Condition, ...]

    @classmethod
    def from_json(cls, value: object) -> Query:
        """Read {"sel": ..., "agg": ..., "conds": [...]}.

        Raises:
            DataError: It isn't of that form.
        """
        try:
            query = cast("Mapping[str, Any]", value)
            conditions = tuple((column, operator, value) for column, operator, value in query["conds"])
            numbers = [query["sel"], query["agg"], *(number for one in conditions for number in one[:2])]
            if not all(isinstance(number, int) for number in numbers):
                raise TypeError("columns, aggregation and operators are numbers")
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"no query in WikiSQL's form: {value!r:.200}.") from error
        return cls(query["sel"], query["agg"], conditions)

    def normalised_conditions(self) -> list[tuple[int, int, str]]:
        """Return the conditions as the official script compares them: values as text, in lower case."""
        return [(column, operator, str(value).lower()) for column, operator, value in self.conditions]


def render_query(query: Query, columns: Columns, table: str) -> str:
    """Write a query as text.

    >>> render_query(Query(0, 3, ((1, 0, "O'Brian"),)), {0: "No.", 1: "Player"}, "1-10")
    "SELECT COUNT(No.) FROM 1-10 WHERE Player = 'O''Brian'"
    """
    aggregation, column = AGGREGATIONS[query.aggregation], columns[query.column]
    selected = f"{aggregation}({column})" if aggregation else column
    conditions = [f"{columns[c]} {OPERATORS[o]} {_quote(value)}" for c, o, value in query.conditions]
    return f"SELECT {selected} FROM {table}" + (f" WHERE {' AND '.join(conditions)}" if conditions else "")


def parse_query(text: str, columns: Columns) -> Query | None:
    """Read a query that a system wrote, as text or as a line of the official format; None where it is none.

    >>> parse_query("select count No. from t where Player = 'Ann' and No. > 3", {0: "No.", 1: "Player"})
    Query(column=0, aggregation=3, conditions=((1, 0, 'Ann'), (0, 1, '3')))
    """
    if text.lstrip().startswith("{"):
        return _parse_line(text)
    names = _name_pattern(columns)
    aggregation = "|".join(AGGREGATIONS[1:])
    # Lazily: a column that is called Max Weight is taken for itself before it is for the maximum of Weight.
    # White space is taken whole (++, *+): given back step by step, it would cost the square of its length.
    select = rf"select\s++(?:({aggregation})\b\s*+(?:\(\s*+)?)??[\"`]?({names})[\"`]?(?:\s*+\))?\s++from\s++"
    found = re.match(rf"{select}.*?(?:\swhere\s+(.*))?$", text.strip(), re.I | re.S)
    conditions = _parse_conditions(found[3] or "", columns) if found else None
    if found is None or conditions is None:
        return None
    return Query(_find_column(found[2], columns), AGGREGATIONS.index((found[1] or "").upper()), conditions)


def _parse_line(text: str) -> Query | None:
    try:
        line = json.loads(text)
        return None if line.get("error") else Query.from_json(line.get("query", line))
    except (ValueError, DataError, AttributeError, RecursionError):
        return None


def _parse_conditions(text: str, columns: Columns) -> tuple[Condition, ...] | None:
    """Cut the text before each AND that a known column and an operator follow: values may hold anything."""
    if not text.strip():
        return ()
    condition = re.compile(rf"(?:^|\sand\s++)[\"`]?({_name_pattern(columns)})[\"`]?\s*+([=<>])\s*+", re.I)
    starts = list(condition.finditer(text.strip()))
    if not starts or starts[0].start() != 0:
        return None
    ends = [start.start() for start in starts[1:]] + [len(text.strip())]
    return tuple(
        (
            _find_column(start[1], columns),
            OPERATORS.index(start[2]),
            _unquote(text.strip()[start.end() : end].strip()),
        )
        for start, end in zip(starts, ends, strict=True)
    )


def _name_pattern(columns: Columns) -> str:
    return "|".join(re.escape(name.strip()) for name in sorted(columns.values(), key=len, reverse=True))


def _find_column(text: str, columns: Columns) -> int:
    """Return the number of a column that `_name_pattern` matched."""
    # By the same rule: to a regular expression the dotless i is an i, to casefold it isn't.
    return next(number for number, name in columns.items() if re.fullmatch(re.escape(name.strip()), text, re.I))


def _quote(value: object) -> str:
    return "'{}'".format(value.replace("'", "''")) if isinstance(value, str) else str(value)


def _unquote(text: str) -> str:
    for quote in ("'", '"'):
        if len(text) > 1 and text[0] == text[-1] == quote:
            return text[1:-1].replace(quote * 2, quote)
    return text


def read_wikisql(path: Path, split: str) -> Iterator[BenchmarkRow]:
    """Read questions with the header of their table, from data.tar.bz2 or from files beside each other.

    The header is in the row, else in SPLIT.tables.jsonl. Rows that only name columns in use are asked with those.
    """
    headers = _read_headers(path, split)
    for values in _iter_questions(path, split):
        yield _build_row(values, headers)


def _build_row(values: Mapping[str, object], headers: Mapping[str, Sequence[str]]) -> BenchmarkRow:
    table = get_text(values, "table_id")
    columns = _read_columns(values, headers.get(table))
    query = Query.from_json(values.get("sql"))
    prompt = f"table: {table}\ncolumns: {', '.join(columns.values())}\nQ: {get_text(values, 'question').strip()}\nA:"
    facts = {"query": query, "columns": columns, "table": table}
    return BenchmarkRow(prompt, (render_query(query, columns, table),), facts)


def _read_columns(values: Mapping[str, object], header: Sequence[str] | None) -> Columns:
    if header := cast("Sequence[str] | None", values.get("header", header)):
        return dict(enumerate(header))
    if isinstance(known := values.get("known_columns"), dict):
        return {int(number): name for number, name in known.items()}
    raise DataError(f"no header for the table {values.get('table_id')}: SPLIT.tables.jsonl is missing beside the rows.")


def _iter_questions(path: Path, split: str) -> Iterator[Mapping[str, object]]:
    if not _is_archive(path):
        yield from iter_values(path)
        return
    with _open_member(path, f"{split}.jsonl") as lines:
        if lines is None:
            raise DataError(f"{path} has no member {split}.jsonl.")
        yield from _parse_lines(lines, f"{path}, {split}.jsonl")


def _read_headers(path: Path, split: str) -> dict[str, Sequence[str]]:
    with _open_beside(path, f"{split}.tables.jsonl") as lines:
        tables = _parse_lines(lines or (), f"{split}.tables.jsonl of {path}")
        return {get_text(table, "id"): cast("Sequence[str]", table["header"]) for table in tables}


def _parse_lines(lines: Iterable[bytes], name: str) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}, line {number}: malformed JSON: {error}.") from error
        if not isinstance(value, dict):
            raise DataError(f"{name}, line {number}: no JSON object.")
        yield value


def open_database(path: Path, split: str) -> sqlite3.Connection | None:
    """Open the tables of a split, in memory; None where SPLIT.db is neither in the archive nor beside the rows."""
    with _open_beside(path, f"{split}.db") as file:
        if file is None:
            return None
        connection = sqlite3.connect(":memory:", check_same_thread=False)
        connection.deserialize(file.read())
        return connection


@contextmanager
def _open_beside(path: Path, name: str) -> Iterator[BinaryIO | None]:
    """Open a member of the archive, or a file beside the rows; None where there is none."""
    if _is_archive(path):
        with _open_member(path, name) as member:
            yield member
    elif (path.parent / name).is_file():
        with (path.parent / name).open("rb") as file:
            yield file
    else:
        yield None


@contextmanager
def _open_member(path: Path, name: str) -> Iterator[BinaryIO | None]:
    """Open one file of the archive, which is read from its start and nothing of it is unpacked to disk."""
    try:
        with tarfile.open(path, "r|*") as archive:
            member = next((entry for entry in archive if entry.isfile() and Path(entry.name).name == name), None)
            yield None if member is None else cast("BinaryIO", archive.extractfile(member))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"can't read {path}: {error}. The file may be damaged or cut; copy it again.") from error


def _is_archive(path: Path) -> bool:
    return ".tar" in path.suffixes or path.suffix == ".tgz"
