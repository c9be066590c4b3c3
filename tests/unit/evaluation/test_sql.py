"""WikiSQL's two metrics: the same query, and the same result."""

from __future__ import annotations

import json
import sqlite3
import time

import pytest

from smolora.data.benchmark_rows import BenchmarkRow
from smolora.data.wikisql import Query
from smolora.errors import DataError
from smolora.evaluation.metric import Answer, MissingResource, Resources
from smolora.evaluation.sql import Execution, LogicalForm

COLUMNS = {0: "Player", 1: "No.", 2: "Team"}
RIGHT = Query(0, 0, ((2, 0, "Bears"), (1, 1, 3)))
ROW = BenchmarkRow("", ("",), {"query": RIGHT, "columns": COLUMNS, "table": "1-10-2"})


@pytest.fixture
def execution(tmp_path):
    """Tables as WikiSQL has them: text in lower case, columns by number."""
    with sqlite3.connect(tmp_path / "dev.db") as database:
        database.execute("CREATE TABLE table_1_10_2 (col0 text, col1 real, col2 text)")
        rows = [("ann", 1, "bears"), ("bob", 4, "bears"), ("cid", 1200.5, "lions"), ("eve", 4, "lions")]
        database.executemany("INSERT INTO table_1_10_2 VALUES (?, ?, ?)", rows)
    database.close()
    return Execution(Resources(file=tmp_path / "dev.jsonl", split="dev"))


@pytest.mark.parametrize(
    ("prediction", "unordered", "ordered"),
    [
        ("SELECT Player FROM t WHERE Team = 'bears' AND No. > 3", 1, 1),
        ("SELECT Player FROM t WHERE No. > 3 AND Team = 'BEARS'", 1, 0),
        ("SELECT Team FROM t WHERE Team = 'bears' AND No. > 3", 0, 0),
        ("SELECT COUNT(Player) FROM t WHERE Team = 'bears' AND No. > 3", 0, 0),
        ("SELECT Player FROM t WHERE Team = 'bears'", 0, 0),
        ("nonsense", 0, 0),
        (json.dumps({"query": {"sel": 0, "agg": 0, "conds": [[2, 0, "bears"], [1, 1, "3"]]}, "error": ""}), 1, 1),
        (json.dumps({"query": {"sel": 0, "agg": 0, "conds": [[2, 0, "bears"], [1, 1, "3"]]}, "error": "no"}), 0, 0),
        (json.dumps({"query": {"sel": [0], "agg": 0, "conds": []}}), 0, 0),
        ("{", 0, 0),
    ],
)
def test_logical_form(prediction, unordered, ordered):
    assert LogicalForm().score(Answer(prediction), ROW) == [unordered, ordered]


@pytest.mark.parametrize(
    ("prediction", "is_right"),
    [
        ("SELECT Player FROM t WHERE No. > 3 AND Team = 'BEARS'", True),
        ("SELECT Player FROM t WHERE Player = 'Bob'", True),  # Another query with the same result.
        ("SELECT Player FROM t WHERE Team = 'lions'", False),
        ("SELECT Player FROM t WHERE No. = 'none'", False),
        (json.dumps({"sel": 9, "agg": 0, "conds": []}), False),
        (json.dumps({"sel": 0, "agg": 0, "conds": [[2, 3, "x"]]}), False),
        (json.dumps({"sel": 0, "agg": 0, "conds": [[0, 0, 10**30]]}), False),
    ],
)
def test_execution(execution, prediction, is_right):
    assert execution.score(Answer(prediction), ROW) == [float(is_right)]


def test_numbers_are_read_as_the_official_script_reads_them(execution):
    right = Query(0, 0, ((1, 0, "1,200.5"),))
    row = BenchmarkRow("", ("",), {**ROW.facts, "query": right})
    assert execution.score(Answer("SELECT Player FROM t WHERE Player = 'cid'"), row) == [1.0]
    assert execution.score(Answer("SELECT Player FROM t WHERE No. = 'about 1200.5 or so'"), row) == [1.0]


def test_a_reference_that_cant_be_run_is_no_bad_prediction(execution):
    elsewhere = BenchmarkRow("", ("",), {**ROW.facts, "table": "9-9"})
    for prediction in ("SELECT Player FROM t", "nonsense"):
        with pytest.raises(DataError, match="can't be run on the table 9-9"):
            execution.score(Answer(prediction), elsewhere)


def test_numbers_are_read_in_linear_time(execution):
    started = time.process_time()
    execution.score(Answer("SELECT Player FROM t WHERE No. = " + "1" * 50_000 + "x"), ROW)
    # .01 s here; where the time grew with the square, 6 s.
    assert time.process_time() - started < 2


def test_without_tables_there_is_no_execution(tmp_path):
    with pytest.raises(MissingResource, match=r"no dev\.db"):
        Execution(Resources(file=tmp_path / "dev.jsonl", split="dev"))
