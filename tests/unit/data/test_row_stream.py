import json
import tracemalloc

import pytest

from smolora.config.data import DataConfig
from smolora.data.row_stream import check_form, close_report, open_file, stream_rows
from smolora.errors import DataError


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def stream(train, held_out=None, **settings):
    opened = [[open_file(file, "jsonl") for file in files] if files else None for files in (train, held_out)]
    return stream_rows(*opened, DataConfig(**settings), tokenizer=None, chunk_tokenizer=None, out=None)


def test_a_column_that_first_appears_in_the_last_row_is_part_of_the_form(tmp_path):
    rows = [{"instruction": "a", "output": "b"}] * 2 + [{"instruction": "a", "input": "c", "output": "b"}]
    found = stream([write_rows(tmp_path / "a.jsonl", rows)])
    assert found.fmt.columns == {"instruction": "instruction", "input": "input", "output": "output"}
    assert len(list(found.train)) == 2


def test_what_the_first_file_has_no_column_for_is_read_of_the_others(tmp_path):
    pair = {"instruction": "a", "output": "b"}
    files = [write_rows(tmp_path / "a.jsonl", [pair]), write_rows(tmp_path / "b.jsonl", [{**pair, "input": "c"}])]
    assert [row.values.get("input") for row in stream(files).train] == [None, "c"]


@pytest.mark.parametrize("rows", [[{"a": "x"}, {"a": "x", "text": "y"}], [{"text": "y"}, {"a": "x"}], []])
def test_a_form_is_there_where_any_row_has_it(tmp_path, rows):
    check_form(open_file(write_rows(tmp_path / "a.jsonl", rows), "jsonl"), DataConfig(), "causal_lm")


def test_a_form_that_no_row_has_is_said_of_all_columns(tmp_path):
    source = open_file(write_rows(tmp_path / "a.jsonl", [{"a": "x"}, {"b": "y"}]), "jsonl")
    with pytest.raises(DataError, match="the columns 'a', 'b' fit no form"):
        check_form(source, DataConfig(), "causal_lm")


def test_lines_that_are_no_rows_name_no_columns_and_are_rejected_when_they_pass(tmp_path):
    (tmp_path / "a.jsonl").write_text('{bad\n["prompt"]\n{"text": "one"}\n')
    found = stream([tmp_path / "a.jsonl"])
    assert found.fmt.columns == {"text": "text"}
    assert [row.values for row in found.train] == [{"text": "one"}]
    assert [reject.line for reject in found.report.rejects] == [1, 2]


def test_rows_to_learn_from_that_are_held_out_too_are_left_out_and_counted_while_they_pass(tmp_path):
    train = write_rows(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}, {"text": "two"}])
    held_out = write_rows(tmp_path / "b.jsonl", [{"Text": "two"}, {"Text": "three"}])
    found = stream([train], [held_out], deduplicate=False)
    assert [row.values for row in found.held_out] == [{"text": "two"}, {"text": "three"}]
    assert [row.values for row in found.train] == [{"text": "one"}]
    assert found.report.also_held_out == 2


def test_a_column_of_the_name_that_is_asked_for_goes_before_one_that_differs_by_case(tmp_path):
    files = [
        write_rows(tmp_path / "a.jsonl", [{"MR": "one", "ref": "x"}]),
        write_rows(tmp_path / "b.jsonl", [{"mr": "two", "MR": "other", "ref": "y"}]),
    ]
    found = stream(files, prompt_field="mr", completion_field="ref")
    assert [row.values for row in found.train] == [{"MR": "one", "ref": "x"}, {"MR": "two", "ref": "y"}]


def test_nothing_is_read_before_it_is_asked_for_and_one_row_is_held_at_a_time(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", ({"text": f"{number} " + "word " * 800} for number in range(2000)))
    found = stream([file])
    assert found.report.read == 0
    tracemalloc.start()
    count = sum(1 for _ in found.train)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == found.report.read == 2000
    assert peak < 1 << 20 < file.stat().st_size / 7  # The digests are 2,000 times about 100 bytes.


def test_a_report_closes_on_rows_alone(tmp_path):
    found = stream([write_rows(tmp_path / "a.jsonl", [{"text": " "}])])
    assert list(found.train) == []
    with pytest.raises(DataError, match=r"no rows in a\.jsonl"):
        close_report(found.report, DataConfig(sources=("a.jsonl",)), train=0, held_out=0, out=None)


def test_held_out_rows_that_are_named_and_not_there_are_refused(tmp_path):
    files = [write_rows(tmp_path / name, [{"text": text}]) for name, text in (("a.jsonl", "one"), ("b.jsonl", " "))]
    found = stream(files[:1], files[1:])
    assert (list(found.held_out), len(list(found.train))) == ([], 1)
    with pytest.raises(DataError, match=r"no rows in b\.jsonl"):
        close_report(found.report, DataConfig(eval_source="b.jsonl"), train=1, held_out=0, out=None)
