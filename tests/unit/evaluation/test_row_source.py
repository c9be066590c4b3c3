"""Rows of a person's own, in every form, and of a benchmark."""

from __future__ import annotations

import json
import logging

import pytest

from smolora.config import DataConfig
from smolora.data.prompts import PromptFormat
from smolora.errors import ConfigError, DataError
from smolora.evaluation.row_source import open_benchmark, open_data
from tests.tiny import tiny_tokenizer


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def open_rows(path, trained=None, num_samples=None, **fields):
    data = DataConfig(sources=(str(path),), **fields)
    return open_data(data, trained=trained, tokenizer=tiny_tokenizer(), num_samples=num_samples)


def read(source):
    return [(row.prompt, row.references) for row in source.iter_rows()]


def test_rows_with_one_prompt_are_one_with_several_references_wherever_they_stand(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("mr,ref\nA,1\nA,2\nB,3\nA,4\n")
    source = open_rows(file, prompt_field="mr", completion_field="ref")
    assert read(source) == read(source) == [("A", ("1", "2", "4")), ("B", ("3",))]
    assert (source.count(), source.name) == (2, "rows")
    assert source.metrics == ("bleu", "rouge", "exact_match", "distinct", "loss")


def test_conversations_with_the_same_turns_share_their_answers(tmp_path):
    turns = [{"role": "user", "content": "hi"}]
    rows = [{"messages": [*turns, {"role": "assistant", "content": answer}]} for answer in ("yes", "no")]
    assert read(open_rows(write(tmp_path / "a.jsonl", rows))) == [(turns, ("yes", "no"))]


def test_the_columns_a_model_was_trained_on_need_no_flags(tmp_path):
    trained = PromptFormat(kind="prompt_completion", columns={"prompt": "mr", "completion": "ref"})
    file = write(tmp_path / "rows.jsonl", [{"mr": "A", "ref": "1"}])
    assert read(open_rows(file, trained)) == [("A", ("1",))]
    with pytest.raises(DataError, match="fit no form"):
        open_rows(file)
    named = write(tmp_path / "named.jsonl", [{"prompt": "A", "completion": "1"}])
    assert read(open_rows(named, trained)) == [("A", ("1",))]


def test_a_row_knows_where_it_came_from(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("mr,ref\nA,1\nA,2\nB,3\n")
    own = open_rows(file, prompt_field="mr", completion_field="ref")
    assert [row.origin for row in own.iter_rows()] == [f"{file}:2", f"{file}:4"]
    file.rename(tmp_path / "testset_w_refs.csv")
    of_benchmark = open_benchmark("e2e_nlg", tmp_path)
    assert [row.origin for row in of_benchmark.iter_rows()] == [
        f"{tmp_path / 'testset_w_refs.csv'}, row {number}" for number in (1, 2)
    ]


def test_texts_have_no_prompt_and_are_not_grouped(tmp_path):
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    source = open_rows(tmp_path / "texts.txt")
    assert read(source) == [("", ("one",)), ("", ("two",))]
    assert source.metrics == ("loss",)


def test_the_last_answer_is_the_reference_and_conversations_without_one_are_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    rows = [[*turns, turns[0]], turns[:1], [turns[0], {**turns[1], "weight": 0}]]
    source = open_rows(write(tmp_path / "a.jsonl", [{"messages": messages} for messages in rows]))
    assert source.count() == 1
    assert read(source) == [(turns[:1], ("yes",))]
    assert caplog.messages == ["left out: 2 conversations without an answer of the assistant's"]


def test_tools_are_asked_with_and_a_call_alone_is_no_reference(tmp_path):
    tools, call = [{"type": "function", "function": {"name": "f"}}], {"function": {"name": "f", "arguments": {}}}
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages = [*turns, {"role": "tool", "content": "1"}, {"role": "assistant", "content": "one"}, *turns]
    trained = PromptFormat(
        kind="messages", columns={"messages": "messages"}, chat_template="{{ tools }}{{ tool_calls }}"
    )
    source = open_rows(write(tmp_path / "a.jsonl", [{"messages": messages, "tools": tools}]), trained)
    [(prompt, references)] = read(source)
    assert (len(prompt), prompt[0]["tools"], references) == (3, tools, ("one",))


def test_instructions_are_rendered_once(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"instruction": "Add.", "input": "1 2", "output": "3"}])
    rendered = "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    assert read(open_rows(file)) == [(rendered, ("3",))]
    trained = PromptFormat(kind="instruction", columns={"instruction": "instruction", "output": "output"})
    [(asked, _)] = read(open_rows(file, trained))
    assert f"### Instruction:\n{asked}\n\n### Response:\n" == rendered


def test_a_prepared_folder_gives_its_held_out_rows(tmp_path):
    write(tmp_path / "train.jsonl", [{"prompt": "A", "completion": "1"}])
    write(tmp_path / "validation.jsonl", [{"prompt": "B", "completion": "2"}])
    assert read(open_rows(tmp_path)) == [("B", ("2",))]


def test_rejected_rows_end_the_evaluation_and_equal_ones_stay(tmp_path):
    row = {"prompt": "A", "completion": "1"}
    rows = open_rows(write(tmp_path / "a.jsonl", [row, {**row, "prompt": "B"}, row]))
    assert read(rows) == [("A", ("1", "1")), ("B", ("1",))]
    (tmp_path / "b.jsonl").write_text(json.dumps(row) + "\nnonsense\n")
    with pytest.raises(DataError, match=r"1 of 2 rows can't be used[\s\S]*take them out of the file.$"):
        open_rows(tmp_path / "b.jsonl").count()


def test_rows_are_taken_from_the_start(tmp_path):
    rows = [{"prompt": str(number), "completion": "x"} for number in range(5)]
    source = open_rows(write(tmp_path / "a.jsonl", rows), num_samples=2)
    assert (source.count(), source.name) == (2, "a-first-2")
    write(tmp_path / "sst2_test.jsonl", [{"text": "fine", "label": 1}] * 3)
    assert open_benchmark("sst2", tmp_path, num_samples=2).count() == 2


def test_rejects_before_the_last_row_that_is_taken_are_errors(tmp_path):
    rows = "".join(json.dumps({"prompt": str(number), "completion": "x"}) + "\n" for number in range(4))
    (tmp_path / "a.jsonl").write_text("nonsense\n" + rows)
    with pytest.raises(DataError, match=r"a\.jsonl:1: malformed JSON"):
        open_rows(tmp_path / "a.jsonl", num_samples=2).count()
    assert open_rows(tmp_path / "a.jsonl", num_samples=2, max_rejects=1).count() == 2


def test_the_digest_is_of_what_is_asked_and_answered(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "a.jsonl", [{"prompt": "The cat", "completion": "sat"}])
    before = open_rows(folder).digest
    assert open_rows(folder).digest == before != open_rows(folder, clean=("lowercase",)).digest
    for changed in ({"prompt": "The dog", "completion": "sat"}, {"prompt": "The cat", "completion": "ran"}):
        write(folder / "a.jsonl", [changed])
        assert open_rows(folder).digest != before


@pytest.mark.parametrize("num_samples", [0, -1])
def test_at_least_a_row_is_asked_for(tmp_path, num_samples):
    write(tmp_path / "sst2_test.jsonl", [{"text": "fine", "label": 1}])
    with pytest.raises(ConfigError, match="num_samples must be at least 1"):
        open_benchmark("sst2", tmp_path, num_samples=num_samples)
    with pytest.raises(ConfigError, match="num_samples must be at least 1"):
        open_rows(write(tmp_path / "a.jsonl", [{"prompt": "A", "completion": "1"}]), num_samples=num_samples)


def test_a_file_that_stands_in_for_the_benchmarks_own_is_named_once(tmp_path, caplog):
    row = {"premise": "P", "hypothesis": "H", "label": 1}
    for name in ("mnli_matched_textfooler1000.jsonl", "multinli_1.0_dev_mismatched.jsonl"):
        write(tmp_path / name, [row, row])
    with caplog.at_level(logging.WARNING, logger="smolora.evaluation"):
        source = open_benchmark("multi_nli", tmp_path)
        assert source.count() == source.count() == 2
        assert open_benchmark("multi_nli", tmp_path, split="validation").count() == 2
    [record] = caplog.records
    assert "mnli_matched_textfooler1000.jsonl (2 rows) stands in for multi_nli-test" in record.getMessage()


def test_no_rows_are_an_error(tmp_path):
    (tmp_path / "sst2_test.jsonl").write_text("")
    with pytest.raises(DataError, match="sst2-test has no rows"):
        open_benchmark("sst2", tmp_path).count()
