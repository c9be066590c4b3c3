import json
import math
import os
import signal
import threading
import time
from datetime import date
from pathlib import Path

import pytest
from datasets import Dataset

from smolora.config.data import DataConfig
from smolora.data.readers import read_rows
from smolora.data.sources import read_source_documents, read_sources
from smolora.errors import ConfigError, DataError, StorageError
from smolora.recipes.prepare import prepare
from tests.signalled import INTERRUPTED, run_signalled


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"row {n}", "id": n} for n in range(100)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0], {"text": ""}]))
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_writes_exactly_four_files_and_every_row_is_accounted_for(source, tmp_path):
    out = tmp_path / "out"
    report = prepare(source, out, DataConfig())
    assert {path.name for path in out.iterdir()} == {
        "train.jsonl", "validation.jsonl", "data_report.json", "rejects.jsonl",
    }  # fmt: skip
    assert len(read_lines(out / "train.jsonl")) == report.train == 95
    assert len(read_lines(out / "validation.jsonl")) == report.held_out == 5
    saved = json.loads((out / "data_report.json").read_text())
    assert (saved["read"], saved["empty"], saved["duplicate"], saved["kept"]) == (102, 1, 1, 100)


def test_train_and_pretrain_read_what_it_wrote(source, tmp_path):
    prepare(source, tmp_path / "out", DataConfig())
    data = DataConfig(sources=(str(tmp_path / "out"),))
    rows, documents = read_sources(data, seed=9), read_source_documents(data)
    assert (len(rows.train), len(rows.held_out)) == (len(documents.train), len(documents.held_out)) == (95, 5)


def test_the_pieces_that_it_wrote_are_one_text_again_for_pretrain(tmp_path):
    (tmp_path / "a.txt").write_text("one two\n\nthree four\nfive")
    (tmp_path / "b.txt").write_text("six")
    prepare(tmp_path, tmp_path / "out", DataConfig(chunk_size=2, file_type="txt"))
    documents = read_source_documents(DataConfig(sources=(str(tmp_path / "out"),)))
    assert documents.train == ["one two\n\nthree four\nfive", "six"]


@pytest.mark.parametrize(
    ("row", "settings", "written"),
    [
        ({"id": 1, "Review": "a", "text": "b"}, {"text_field": "review"}, {"id": 1, "text": "a"}),
        ({"Prompt": "p", "completion": "c", "body": "a"}, {"text_field": "body"}, {"text": "a", "Prompt": "p"}),
        (
            {"mr": "p", "ref": "c"},
            {"prompt_field": "mr", "completion_field": "ref"},
            {"prompt": "p", "completion": "c"},
        ),
        ({"Instruction": "i", "input": "", "output": "o"}, {}, {"instruction": "i", "input": "", "output": "o"}),
    ],
)
def test_what_it_writes_is_read_without_naming_a_column(tmp_path, row, settings, written):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    prepare(tmp_path / "a.jsonl", tmp_path / "out", DataConfig(**settings))
    assert read_lines(tmp_path / "out" / "train.jsonl") == [written]
    read_back = read_sources(DataConfig(sources=(str(tmp_path / "out"),)), seed=0)
    assert set(read_back.fmt.columns) == set(read_back.fmt.columns.values()) <= set(written)


def test_columns_outside_the_form_are_kept(source, tmp_path):
    prepare(source, tmp_path / "out", DataConfig())
    assert set(read_lines(tmp_path / "out" / "train.jsonl")[0]) == {"text", "id"}


REVIEWS = [(1, "bad", "1"), (2, "bad", "5"), (3, "bad", "1"), (4, "good", "5")]


@pytest.fixture
def reviews(tmp_path):
    path = tmp_path / "reviews.csv"
    path.write_text("id,review,stars\n" + "".join(f"{key},{text},{stars}\n" for key, text, stars in REVIEWS))
    return path


def test_for_a_classifier_rows_of_another_label_are_no_duplicates(reviews, tmp_path):
    data = DataConfig(text_field="review", label_field="stars")
    report = prepare(reviews, tmp_path / "out", data, task="classification")
    assert (report.train, report.duplicate) == (3, 1)
    assert read_lines(tmp_path / "out" / "train.jsonl")[1] == {"text": "bad", "label": "5", "id": "2"}
    read_back = read_sources(DataConfig(sources=(str(tmp_path / "out"),)), seed=0, task="classification")
    assert read_back.report.kept == 3


def test_a_column_that_a_task_would_take_for_its_own_is_left_out(tmp_path):
    row = {"premise": "a", "hypothesis": "b", "review": "c", "stars": 1}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    data = DataConfig(text_field="review", label_field="stars")
    prepare(tmp_path / "a.jsonl", tmp_path / "out", data, task="classification")
    assert read_lines(tmp_path / "out" / "train.jsonl") == [{"text": "c", "label": 1}]


@pytest.mark.parametrize("task", ["causal_lm", "classification"])
def test_it_is_said_that_further_columns_make_no_row_another_one(reviews, tmp_path, caplog, task):
    caplog.set_level("INFO")
    label = {"label_field": "stars"} if task == "classification" else {}
    prepare(reviews, tmp_path / "out", DataConfig(text_field="review", **label), task=task)
    assert ("'id', 'stars' made no difference" in caplog.text) == (task == "causal_lm")


def test_further_columns_that_json_has_no_form_for_are_written_as_valid_json(tmp_path):
    odd = {"score": math.nan, "scores": [{"high": math.inf, "low": 0.5}], "raw": b"\xff\x00", "day": date(2026, 1, 2)}
    Dataset.from_list([{"text": "a", **odd}]).to_parquet(tmp_path / "a.parquet")
    prepare(tmp_path / "a.parquet", tmp_path / "out", DataConfig())
    [line] = (tmp_path / "out" / "train.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "text": "a", "score": None, "scores": [{"high": None, "low": 0.5}], "raw": "/wA=", "day": "2026-01-02",
    }  # fmt: skip


def test_the_same_seed_writes_the_same_bytes(source, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare(source, tmp_path / name, DataConfig(), seed=seed)
    first, again, other = ((tmp_path / name / "validation.jsonl").read_bytes() for name in "abc")
    assert first == again != other


def test_text_survives_unchanged(tmp_path):
    (tmp_path / "a.csv").write_bytes('text\n"é 日\r\n\u2028  two"\n'.encode())
    prepare(tmp_path / "a.csv", tmp_path / "out", DataConfig())
    assert read_sources(DataConfig(sources=(str(tmp_path / "out"),)), seed=0).train[0].values == {
        "text": "é 日\r\n\u2028  two"
    }


def test_text_is_chunked_and_cleaned_where_asked(tmp_path):
    (tmp_path / "a.txt").write_text("<p>one two</p>\n<p>three</p>")
    prepare(tmp_path / "a.txt", tmp_path / "out", DataConfig(chunk_size=2, clean="strip_html"))
    first, last = read_lines(tmp_path / "out" / "train.jsonl")
    assert (first["text"], first["space_to_next"], last) == ("one two", "\n\n", {"text": "three"})


def test_rejects_leave_the_account_alone_and_a_second_attempt_works(tmp_path):
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_text('{"text": "one"}\n{bad\n')
    with pytest.raises(DataError, match="1 of 2 rows can't be used"):
        prepare(source, out, DataConfig())
    assert {path.name for path in out.iterdir()} == {"rejects.jsonl", "data_report.json"}
    report = prepare(source, out, DataConfig(max_rejects=1))
    assert (report.train, len(read_lines(out / "rejects.jsonl"))) == (1, 1)


def test_a_second_attempt_leaves_the_folder_the_one_that_it_was(tmp_path):
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_text('{"text": "one"}\n{bad\n')
    out.mkdir()
    before = out.stat().st_ino
    with pytest.raises(DataError, match="1 of 2 rows can't be used"):
        prepare(source, out, DataConfig())
    prepare(source, out, DataConfig(max_rejects=1))
    assert out.stat().st_ino == before


def test_the_current_folder_is_an_output(source, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    prepare(source, Path(), DataConfig())
    assert len(read_lines(tmp_path / "out" / "train.jsonl")) == 95


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX processes")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_signal_that_asks_to_stop_leaves_nothing(source, tmp_path):
    assert run_signalled(signal.SIGTERM, prepare, source, tmp_path / "out", DataConfig()) == INTERRUPTED
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX processes")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_folder_that_a_kill_left_in_part_is_no_source(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert (
        run_signalled(signal.SIGKILL, prepare, source, out, DataConfig(), moving=out / "train.jsonl") == -signal.SIGKILL
    )
    assert (out / "validation.jsonl").is_file()
    with pytest.raises(DataError, match="files of several types"):
        read_sources(DataConfig(sources=(str(out),)), seed=0)


def test_a_wrong_source_leaves_no_folder(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        prepare(tmp_path / "no.jsonl", tmp_path / "out", DataConfig())
    assert not (tmp_path / "out").exists()


def test_an_output_that_holds_something_is_refused_and_untouched(source, tmp_path):
    prepare(source, tmp_path / "out", DataConfig())
    before = (tmp_path / "out" / "train.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="holds train.jsonl already"):
        prepare(source, tmp_path / "out", DataConfig(), seed=5)
    assert (tmp_path / "out" / "train.jsonl").read_bytes() == before


def test_an_output_below_a_file_is_refused_before_the_source_is_read(source, tmp_path):
    with pytest.raises(StorageError, match=f"can't write {source / 'out'}: .*Part of the path is a file"):
        prepare(tmp_path / "missing.txt", source / "out", DataConfig())


def test_an_output_that_is_a_file_is_refused(source, tmp_path):
    with pytest.raises(ConfigError, match="is a file"):
        prepare(source, source, DataConfig())


def test_the_split_keeps_order_and_every_line(tmp_path):
    rows = [{"text": f"row {number}\u2028"} for number in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(tmp_path / "a.jsonl", tmp_path / "out", DataConfig(), seed=3)
    train, held_out = (read_rows(tmp_path / "out" / f"{name}.jsonl", "jsonl") for name in ("train", "validation"))
    assert len(held_out) == 10
    for part in (train, held_out):
        assert [row.values for row in part] == [row for row in rows if row in [found.values for found in part]]
    assert len(train) + len(held_out) == len(rows)


def test_what_appears_in_the_output_meanwhile_is_kept(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {number}\n" for number in range(20_000)))
    out, deadline = tmp_path / "out", time.monotonic() + 60

    def put_something():
        while not list(tmp_path.glob(".tmp-*")) and time.monotonic() < deadline:
            pass
        out.mkdir()
        (out / "mine").write_text("precious")

    other = threading.Thread(target=put_something)
    other.start()
    with pytest.raises(ConfigError, match="holds mine already"):
        prepare(tmp_path / "a.txt", out, DataConfig())
    other.join()
    assert (out / "mine").read_text() == "precious"
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "out"}


def test_further_columns_stay_but_for_those_that_would_make_other_rows(tmp_path, caplog):
    caplog.set_level("INFO")
    row = {"story": "a", "text": "b", "input": "c", "prompt": "d", "output": "e", "label": 1}
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps(row) + "\n")
    prepare(source, tmp_path / "out", DataConfig(text_field="story"))
    assert read_lines(tmp_path / "out" / "train.jsonl") == [{"text": "a", "input": "c", "prompt": "d", "label": 1}]
    assert "left out: 'text', 'output', by whose names" in caplog.text
