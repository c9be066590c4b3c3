"""The readers of benchmark files, on small files of each form."""

from __future__ import annotations

import json

import pytest

from smolora.data.benchmark_rows import read_ag_news, read_e2e, read_nli, read_samsum, read_squad, read_sst2
from smolora.errors import DataError


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_references_of_e2e_are_grouped_whatever_the_case_of_the_columns(tmp_path):
    (tmp_path / "a.csv").write_text("MR,ref\nname[A],One.\nname[A],Two.\nname[B],Three.\n")
    rows = list(read_e2e(tmp_path / "a.csv", "test"))
    assert [(row.prompt, row.references) for row in rows] == [("name[A]", ("One.", "Two.")), ("name[B]", ("Three.",))]


def test_dialogues_are_kept_as_they_are(tmp_path):
    [row] = read_samsum(write(tmp_path / "a.jsonl", {"dialogue": "A: x\r\nB: y", "summary": "S"}), "test")
    assert (row.prompt, row.references) == ("A: x\r\nB: y", ("S",))


def test_both_namings_of_nli_are_read_and_undecided_rows_left_out(tmp_path):
    file = write(
        tmp_path / "a.jsonl",
        {"premise": "P", "hypothesis": "H", "label": "neutral"},
        {"sentence1": "P", "sentence2": "H", "gold_label": "contradiction"},
        {"sentence1": "P", "sentence2": "H", "gold_label": "-"},
    )
    rows = list(read_nli(file, "test"))
    assert {row.prompt for row in rows} == {"Premise: P\nHypothesis: H\nRelation:"}
    assert [row.references for row in rows] == [("neutral",), ("contradiction",)]


def test_nli_labels_may_be_numbers(tmp_path):
    rows = [{"premise": "P", "hypothesis": "H", "label": label} for label in (0, 1, 2, -1, "2")]
    found = [row.references for row in read_nli(write(tmp_path / "a.jsonl", *rows), "test")]
    assert found == [("entailment",), ("neutral",), ("contradiction",), ("contradiction",)]
    for row in ({**rows[0], "label": 3}, {"premise": "P", "hypothesis": "H"}):
        with pytest.raises(DataError, match="is none of entailment, neutral, contradiction"):
            list(read_nli(write(tmp_path / "b.jsonl", row), "test"))


def test_labels_are_words_where_the_file_has_numbers(tmp_path):
    [row] = read_sst2(write(tmp_path / "a.jsonl", {"text": "fine", "label": 1}), "test")
    assert row.references == ("positive",)
    [row] = read_ag_news(write(tmp_path / "b.jsonl", {"title": "T", "description": "D", "label": 3}), "test")
    assert (row.prompt, row.references) == ("News: T\nD\nTopic:", ("Sci/Tech",))


@pytest.mark.parametrize("label", [2, -1, "good", None])
def test_a_label_that_isnt_one_is_an_error(tmp_path, label):
    with pytest.raises(DataError, match="is none of negative, positive"):
        list(read_sst2(write(tmp_path / "a.jsonl", {"text": "fine", "label": label}), "test"))


def test_a_row_that_cant_be_read_ends_the_benchmark(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"dialogue": "x", "summary": "y"}\n{"dialogue"\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: malformed JSON.*A benchmark needs every row"):
        list(read_samsum(tmp_path / "a.jsonl", "test"))


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path):
    with pytest.raises(DataError, match="no text in a column 'summary'. Columns found: dialogue, abstract"):
        list(read_samsum(write(tmp_path / "a.jsonl", {"dialogue": "x", "abstract": "y"}), "test"))


def test_squad_questions_come_with_each_different_answer_once(tmp_path):
    answers = [{"text": "May"}, {"text": "May"}, {"text": "in May"}]
    paragraph = {"context": "C", "qas": [{"id": "q1", "question": "When?", "answers": answers}]}
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    [row] = read_squad(tmp_path / "a.json", "test")
    assert (row.references, row.facts["asked"]["id"]) == (("May", "in May"), "q1")
    paragraph["qas"][0]["answers"] = []
    (tmp_path / "c.json").write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    assert [row.references for row in read_squad(tmp_path / "c.json", "test")] == [("",)]
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(DataError, match="b.json: not in SQuAD's format"):
        list(read_squad(tmp_path / "b.json", "test"))
