"""WikiSQL by the rules of its official script: is it the same query, and does it give the same result?"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from typing import cast

from smolora.data.benchmark_rows import BenchmarkRow
from smolora.data.wikisql import AGGREGATIONS, OPERATORS, Columns, Query, open_database, parse_query
from smolora.errors import DataError
from smolora.evaluation.metric import Answer, MeanMetric, MissingResource, Resources

_VERSION = "rules of WikiSQL's evaluate.py"
_NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")
_DECIMAL = re.compile(r"[-+]?[\d,]*(?:\.\d*)?(?:[eE][-+]?\d+)?")
_FAILURES = (sqlite3.Error, ValueError, IndexError, KeyError, TypeError, OverflowError)
"""What a query may raise: it is a prediction, and may hold anything."""

_COLUMN_TYPE = re.compile(r"(col\d+) (\w+)")


class LogicalForm(MeanMetric):
    """Whether the query is the reference's: same column, aggregation and conditions, whose order may matter or not."""

    names = ("logical_form", "logical_form_ordered")
    variants = (
        "same query, conditions in any order, share of rows",
        "same query, conditions in the same order, share of rows",
    )
    version = _VERSION

    def score(self, answer: Answer, row: BenchmarkRow) -> Sequence[float]:
        """Return 1 or 0 for both."""
        found, expected, _ = _read(answer, row)
        if found is None or (found.column, found.aggregation) != (expected.column, expected.aggregation):
            return [0.0, 0.0]
        ours, theirs = found.normalised_conditions(), expected.normalised_conditions()
        return [float(set(ours) == set(theirs)), float(ours == theirs)]


class Execution(MeanMetric):
    """Whether the query gives what the reference's gives on the tables."""

    names = ("execution",)
    variants = ("same result on the sqlite tables, share of rows",)
    version = f"{_VERSION}, sqlite {sqlite3.sqlite_version}"

    def __init__(self, resources: Resources) -> None:
        """Open the tables.

        Raises:
            MissingResource: They aren't there.
        """
        database = open_database(resources.file, resources.split) if resources.file else None
        if database is None:
            raise MissingResource(f"no {resources.split}.db is in the archive or beside the rows.", self.variants)
        self._database = database

    def score(self, answer: Answer, row: BenchmarkRow) -> Sequence[float]:
        """Return 1 or 0.

        Raises:
            DataError: The reference can't be run on the tables.
        """
        found, expected, table = _read(answer, row)
        try:
            right = execute_query(self._database, table, expected)
        except _FAILURES as error:
            raise DataError(
                f"the reference can't be run on the table {table}: {error!r}. Is it in the file?"
            ) from error
        if found is None:
            return [0.0]
        try:
            return [float(execute_query(self._database, table, found) == right)]
        except _FAILURES:
            return [0.0]  # A query that can't be run gives no result.


def execute_query(database: sqlite3.Connection, table: str, query: Query) -> list[object]:
    """Return the results of a query, its values lower-cased as the tables' are.

    Raises:
        sqlite3.Error, ValueError, IndexError, KeyError, TypeError, OverflowError: It can't be run.
    """
    name = f"table_{table.replace('-', '_')}"
    schema = database.execute("SELECT sql FROM sqlite_master WHERE tbl_name = ?", (name,)).fetchone()[0]
    types = dict(_COLUMN_TYPE.findall(schema))
    clauses, values = [], {}
    for column, operator, value in query.conditions:
        key = f"col{int(column)}"
        clauses.append(f"{key} {OPERATORS[operator]} :{key}")
        values[key] = _convert(value, is_number=types[key] == "real")  # The last one counts, as in the official script.
    selected = f"col{int(query.column)}"
    if aggregation := AGGREGATIONS[query.aggregation]:
        selected = f"{aggregation}({selected})"
    where = f" WHERE {' AND '.join(clauses)}" if clauses else ""
    return [row[0] for row in database.execute(f"SELECT {selected} FROM {name}{where}", values)]


def _convert(value: object, *, is_number: bool) -> object:
    if isinstance(value, str):
        value = value.lower()
        if is_number:
            text = value.strip()
            return float(text.replace(",", "") if _DECIMAL.fullmatch(text) else _NUMBER.findall(value)[0])
    return value


def _read(answer: Answer, row: BenchmarkRow) -> tuple[Query | None, Query, str]:
    facts = row.facts
    columns = cast("Columns", facts["columns"])
    return parse_query(answer.text, columns), cast("Query", facts["query"]), str(facts["table"])
