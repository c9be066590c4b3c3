"""Queries as text and back, and the archive read member by member."""

from __future__ import annotations

import io
import json
import sqlite3
import tarfile
import time

import pytest

from smolora.data.benchmarks import get_benchmark
from smolora.data.wikisql import Query, open_database, parse_query, read_wikisql, render_query
from smolora.errors import DataError
from tests.unit.data.conftest import require_shared

COLUMNS = {0: "Player", 1: "Max Weight", 2: "Weight", 3: "Winners from previous round", 4: "No. and team"}


def test_every_query_of_the_official_dev_set_makes_the_round_trip():
    file = require_shared("data/wikisql/dev.jsonl.gz")
    different = []
    for row in get_benchmark("wikisql").iter_rows("validation", file):
        query, found = row.facts["query"], parse_query(row.references[0], row.facts["columns"])
        same = found and (found.column, found.aggregation) == (query.column, query.aggregation)
        if not same or found.normalised_conditions() != query.normalised_conditions():
            different.append(row.references[0])
    assert different == []


@pytest.mark.parametrize(
    "query",
    [
        Query(0, 0, ()),
        Query(2, 1, ((0, 0, "O'Brian and 'co'"),)),
        Query(1, 0, ((3, 1, 4), (4, 2, 0.5))),
        Query(3, 5, ((0, 0, "x and Weight"), (0, 0, "select a from b where c"))),
    ],
)
def test_what_is_rendered_is_parsed(query):
    found = parse_query(render_query(query, COLUMNS, "1-10"), COLUMNS)
    assert (found.column, found.aggregation) == (query.column, query.aggregation)
    assert found.normalised_conditions() == query.normalised_conditions()


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("select max weight from t", Query(1, 0, ())),
        ("SELECT MAX(Weight) FROM t", Query(2, 1, ())),
        ('SELECT "Player" FROM t WHERE "Weight" = 3', Query(0, 0, ((2, 0, "3"),))),
        ("SELECT Player FROM t WHERE Player = Patrick O'Bryant", Query(0, 0, ((0, 0, "Patrick O'Bryant"),))),
        ("SELECT Height FROM t", None),
        ("SELECT Player FROM t WHERE Height = 3", None),
        ("Player", None),
        ("", None),
        ("{nonsense", None),
    ],
)
def test_text_of_other_systems_is_read(text, query):
    assert parse_query(text, COLUMNS) == query


@pytest.mark.parametrize(
    ("name", "written"), [("\u0130stanbul", "istanbul"), ("Winner", "w\u0131nner"), ("Kelvin", "\u212aelvin")]
)
def test_letters_that_fold_in_several_ways_name_their_column(name, written):
    assert parse_query(f"select {written} from t where {written} = 3", {4: name}) == Query(4, 0, ((4, 0, "3"),))


def add(archive, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


@pytest.fixture
def archive(tmp_path):
    """An archive in the official form, with the rows before their tables."""
    with sqlite3.connect(":memory:") as database:
        database.execute("CREATE TABLE table_1_10 (col0 text)")
        tables = database.serialize()
    database.close()
    row = {"table_id": "1-10", "question": "who?", "sql": {"sel": 0, "agg": 0, "conds": [[1, 0, "x"]]}}
    table = {"id": "1-10", "header": ["Player", "Team"], "rows": [["a", "b"]]}
    with tarfile.open(tmp_path / "data.tar.bz2", "w:bz2") as made:
        for split in ("dev", "test"):
            add(made, f"data/{split}.jsonl", (json.dumps(row | {"question": split}) + "\n").encode())
            add(made, f"data/{split}.tables.jsonl", (json.dumps(table) + "\n").encode())
        add(made, "data/test.db", tables)
    return tmp_path / "data.tar.bz2"


def test_the_archive_is_read_without_unpacking_it(archive):
    [row] = read_wikisql(archive, "dev")
    assert row.prompt == "table: 1-10\ncolumns: Player, Team\nQ: dev\nA:"
    assert row.references == ("SELECT Player FROM 1-10 WHERE Team = 'x'",)
    assert list(archive.parent.iterdir()) == [archive]


def test_tables_are_opened_from_the_archive_where_they_are_there(archive):
    database = open_database(archive, "test")
    assert database.execute("SELECT count(*) FROM table_1_10").fetchone() == (0,)
    database.close()
    assert open_database(archive, "dev") is None


def test_a_damaged_archive_is_an_error(archive):
    archive.write_bytes(archive.read_bytes()[:100])
    with pytest.raises(DataError, match="may be damaged or cut"):
        list(read_wikisql(archive, "test"))


@pytest.mark.parametrize(("line", "reason"), [(b'{"table_id"', "malformed JSON"), (b"[]", "no JSON object")])
def test_broken_lines_are_named(tmp_path, line, reason):
    with tarfile.open(tmp_path / "data.tar.bz2", "w:bz2") as made:
        add(made, "data/dev.jsonl", line + b"\n")
    with pytest.raises(DataError, match=rf"dev\.jsonl, line 1: {reason}"):
        list(read_wikisql(tmp_path / "data.tar.bz2", "dev"))
    (tmp_path / "dev.jsonl").write_text("{}\n")
    (tmp_path / "dev.tables.jsonl").write_bytes(b'{"id": "1", "header": []}\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"dev\.tables\.jsonl of .*, line 2: {reason}"):
        list(read_wikisql(tmp_path / "dev.jsonl", "dev"))


def test_a_row_without_a_header_is_an_error(tmp_path):
    row = {"table_id": "1-10", "question": "who?", "sql": {"sel": 0, "agg": 0, "conds": []}}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="no header for the table 1-10"):
        list(read_wikisql(tmp_path / "test.jsonl", "test"))


def test_text_is_read_in_linear_time():
    started = time.process_time()
    for filler in (" ", "where ", "Player = a and ", "max "):
        parse_query("select Player from t" + filler * 50_000 + "x", COLUMNS)
    for start in ("select", "select max", "select max(", "select Player", "select Player from t where Player"):
        parse_query(start + " " * 50_000 + "x", COLUMNS)
    # .2 s here; where the time grew with the square, the first filler alone took 12 s.
    assert time.process_time() - started < 4
