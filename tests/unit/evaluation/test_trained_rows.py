"""Which rows a run was trained on, in every form, as an evaluation asks them."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from smolora.config import DataConfig
from smolora.data.ledger import DataReport
from smolora.data.prompts import PromptFormat
from smolora.data.rows import Row
from smolora.data.sources import SourceRows, read_sources
from smolora.evaluation.row_source import open_benchmark, open_data
from smolora.evaluation.trained_rows import count_trained_rows, write_trained_rows
from smolora.records.run_dir import RunDir
from tests.tiny import tiny_tokenizer


def chat(number):
    return [{"role": "user", "content": f"hi {number}"}, {"role": "assistant", "content": "yes"}]


FORMS = {
    "text": ("causal_lm", lambda n: {"text": f"a cat {n}"}),
    "pairs": ("causal_lm", lambda n: {"prompt": f"a cat {n}", "completion": "sat"}),
    "instructions": ("causal_lm", lambda n: {"instruction": "add", "input": f"{n} and 1", "output": f"{n + 1}"}),
    "messages": ("causal_lm", lambda n: {"messages": chat(n)}),
    "labels": ("classification", lambda n: {"text": f"a cat {n}", "label": n % 2}),
    "words": ("token_classification", lambda n: {"tokens": ["a", f"cat{n}"], "ner_tags": ["O", "B-X"]}),
    "questions": (
        "qa",
        lambda n: {"question": f"who {n}?", "context": "a cat", "answers": {"text": ["cat"], "answer_start": [2]}},
    ),
}


@pytest.fixture
def run(tmp_path):
    """The folder of a run."""
    folder = RunDir(tmp_path / "run")
    folder.path.mkdir()
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def learn(run, rows, *, task="causal_lm", started_from=()):
    file = write(run.path.parent / f"{run.path.name}.jsonl", rows)
    learned = read_sources(DataConfig(sources=(file,)), seed=0, task=task)
    write_trained_rows(run, learned, started_from=started_from)
    return learned.fmt


def count(model, rows, tmp_path, *, task="causal_lm", trained=None):
    data = DataConfig(sources=(write(tmp_path / "asked.jsonl", rows),))
    source = open_data(data, trained=trained, tokenizer=tiny_tokenizer(), task=task)
    return count_trained_rows(model, source.iter_rows())


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_were_learned_from_are_counted_in_every_form(run, tmp_path, form):
    task, make = FORMS[form]
    fmt = learn(run, [make(number) for number in range(4)], task=task)
    assert run.trained_rows.stat().st_size == 4 * 8
    assert count(run.path, [make(number) for number in range(2, 9)], tmp_path, task=task, trained=fmt) == 2


def test_rows_that_the_run_holds_out_are_not_counted(run, tmp_path):
    rows = [{"prompt": f"a cat {number}", "completion": "sat"} for number in range(60)]
    learn(run, rows)
    assert count(run.path, rows, tmp_path) == 57


def test_a_prompt_with_another_answer_is_not_counted(run, tmp_path):
    learn(run, [{"prompt": "a cat", "completion": "sat"}])
    assert count(run.path, [{"prompt": "a cat", "completion": "ran"}], tmp_path) == 0


def test_a_conversation_that_ends_with_a_question_counts_by_its_last_answer(run, tmp_path):
    learn(run, [{"messages": [*chat(1), chat(2)[0]]}, {"messages": chat(3)}])
    assert count(run.path, [{"messages": chat(number)} for number in (1, 3)], tmp_path) == 2


def test_a_turn_is_the_same_whatever_else_it_holds(run, tmp_path):
    at = datetime(2026, 11, 30, tzinfo=UTC)
    fmt = PromptFormat(kind="messages", columns={"messages": "messages"})
    rows = [
        Row({"messages": [{**turn, "time": at, "weight": 1} for turn in chat(number)]}, "f", 1) for number in (1, 2)
    ]
    write_trained_rows(run, SourceRows(rows, [], fmt, DataReport()), started_from=())
    assert count(run.path, [{"messages": chat(number)} for number in (2, 3)], tmp_path) == 1


def test_rows_of_a_benchmark_are_counted_one_by_one(run, tmp_path):
    (tmp_path / "trainset.csv").write_text("mr,ref\nname[A],A cat sat.\nname[A],Cats sit.\nname[B],B.\n")
    fields = {"prompt_field": "prompt", "completion_field": "completion"}
    source = f"benchmark:e2e_nlg:train:{tmp_path}"
    write_trained_rows(run, read_sources(DataConfig(sources=(source,), **fields), seed=0), started_from=())
    (tmp_path / "testset_w_refs.csv").write_text("mr,ref\nname[A],A cat ran.\nname[A],Cats sit.\nname[C],B.\n")
    assert count_trained_rows(run.path, open_benchmark("e2e_nlg", tmp_path).iter_rows()) == 1


def test_rows_of_the_run_that_another_goes_on_from_are_counted_too(run, tmp_path):
    rows = [{"prompt": f"a cat {number}", "completion": "sat"} for number in range(3)]
    learn(run, rows[:1])
    run.adapter.mkdir()
    later = RunDir(tmp_path / "later")
    later.path.mkdir()
    learn(later, rows[1:2], started_from=("some/hub-id", str(run.adapter), None))
    assert count(later.path, rows, tmp_path) == 2


def test_nothing_is_said_of_a_model_that_kept_nothing(run, tmp_path, monkeypatch):
    learn(run, [{"prompt": "a cat", "completion": "sat"}])
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(run.path)
    for model in (tmp_path / "model", "hub-id"):
        assert count(model, [{"prompt": "a cat", "completion": "sat"}], tmp_path) is None
