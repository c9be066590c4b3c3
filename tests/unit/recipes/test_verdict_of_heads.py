"""The verdict on a run that labels words or finds answers: its answers to held-out rows, base against tuned."""

from __future__ import annotations

import json
import random

import pytest

from smolora.config import DataConfig
from smolora.inference.pipeline import InferencePipeline
from smolora.recipes.evaluate import evaluate
from smolora.recipes.evaluation_request import EvaluationRequest
from tests.head_runs import ask_rows, read_verdict, tune_head, write_rows

NAMES, PLACES = ("Eagle", "Zoe", "Rome", "Mill"), ("river", "mill", "log", "mat")


def words(count=160):
    """Of the words, those after `the` are a name, of one word or of two."""
    return [
        {
            "tokens": ["the", NAMES[i % 4], ("Mill", "sat")[i % 2], f"{i}"],
            "tags": ["O", "B-PER", ("I-PER", "O")[i % 2], "O"],
        }
        for i in range(count)
    ]


def questions(count=160):
    """Contexts take two windows or three; every tenth question leaves no room for any."""
    rows = []
    for number in range(count):
        place = PLACES[number % 4]
        context = f"the dog sat on the {place}. " + "it went away. " * 6 + f"by {number}."
        answers = [{"text": place, "answer_start": context.index(place)}]
        question = "where? " * (1 if number % 10 else 40)
        rows.append({"question": question, "context": context, "answers": answers})
    return rows


def tune(folder, task, rows, *assignments):
    return tune_head(folder, task, rows, "data.validation_fraction=0.3", "training.max_steps=30", *assignments)


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    return tune(tmp_path_factory.mktemp("words"), "token_classification", words())


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return tune(tmp_path_factory.mktemp("questions"), "qa", questions(), "data.overlong=drop", "training.max_steps=90")


def test_a_run_that_labels_words_is_told_so_by_its_entities(tagger):
    found = read_verdict(tagger)
    assert found["verdict"] == "learned"
    assert found["metric"]["name"] == "entity_f1" and found["metric"]["tuned"] == 1.0
    assert {"accuracy", "f1"} < {metric["name"] for metric in found["other_metrics"]}
    assert found["majority"]["base"] < 0.7 and found["majority"]["tuned"] == 1.0
    assert found["samples"][0]["tuned"] == found["samples"][0]["reference"] != found["samples"][0]["base"]
    assert any("always naming the commonest label" in line for line in found["findings"])


def test_labels_drawn_for_each_word_are_no_change_however_far_the_loss_falls(tmp_path):
    """Three of four are yes: the random head is beaten by far, the commonest label isn't."""
    drawn = random.Random(0)
    rows = [{**row, "tags": ["yes" if drawn.random() < 0.75 else "no" for _ in row["tags"]]} for row in words()]
    found = read_verdict(tune(tmp_path, "token_classification", rows, "training.max_steps=15"))
    assert found["verdict"] == "no change" and found["metric"]["name"] == "accuracy"
    assert found["loss"]["high"] < 0 and found["majority"]["low"] <= 0


def test_an_evaluation_of_words_takes_what_training_took(tagger, tmp_path):
    rows = [{"tokens": row["tokens"], "ner_tags": row["tags"]} for row in words(20)]
    found = ask_rows(tagger.path, rows, tmp_path).metrics
    assert found["accuracy"] == found["entity_f1"] == 1.0 and found["loss"] < 0.2


def test_columns_are_those_of_the_training_unless_they_are_named(tagger, tmp_path):
    rows = [{"pieces": row["tokens"], "kinds": row["tags"], "labels": row["tags"]} for row in words(8)]
    file = tmp_path / "rows.jsonl"
    write_rows(file, rows)
    data = DataConfig(sources=(str(file),), text_field="pieces", label_field="kinds")
    assert evaluate(EvaluationRequest(model=str(tagger.path), data=data)).metrics["accuracy"] == 1.0


def test_without_its_adapter_the_head_labels_as_at_the_start(tagger):
    pipeline = InferencePipeline.from_path(tagger.path, device="cpu")
    row = ["the", "Zoe", "Mill", "1"]
    assert [word.label for word in pipeline.label_words(row)] == ["O", "B-PER", "I-PER", "O"]
    assert pipeline.label_words(row, adapter="base") != pipeline.label_words(row)


def test_a_run_that_finds_answers_is_told_so_by_squads_f1(reader):
    found = read_verdict(reader)
    assert found["verdict"] == "learned" and found["majority"] is None
    assert found["metric"]["name"] == "f1" and found["metric"]["tuned"] > 0.9 > 0.5 > found["metric"]["base"]
    assert [metric["name"] for metric in found["other_metrics"]] == ["exact_match"]
    assert found["samples"][0]["reference"] in PLACES


def test_held_out_questions_that_were_dropped_are_not_asked(reader):
    report = json.loads((reader.path / "data_report.json").read_text())["encoded"]["validation"]
    assert report["dropped_overlong"] > 0 and report["added_by_windows"] > 0
    assert read_verdict(reader)["metric"]["num_rows"] == report["rows"] - report["dropped_overlong"]


def test_answers_to_another_question_about_the_context_are_no_change_however_far_the_loss_falls(tmp_path):
    """One of two answers is learned to be right, and by chance which."""
    rows, drawn = [], random.Random(0)
    for number in range(80):
        context = f"the {drawn.choice(NAMES)} sat on the {drawn.choice(PLACES)}. by {number}."
        answers = drawn.sample([context.split()[1], context.split()[5].strip(".")], 2)
        for question, answer in zip(("who?", "where?"), answers, strict=True):
            found = [{"text": answer, "answer_start": context.index(answer)}]
            rows.append({"question": question, "context": context, "answers": found})
    held_out = tmp_path / "held_out.jsonl"
    write_rows(held_out, rows[:60])
    found = read_verdict(tune(tmp_path, "qa", rows[60:], f"data.eval_source={held_out}"))
    assert found["verdict"] == "no change" and "after another question about its context" in found["reason"]
    assert found["loss"]["high"] < 0 and found["metric"]["low"] > 0
    assert found["prompt_use"]["num_rows"] > 50


def test_an_evaluation_of_questions_takes_what_training_took(reader, tmp_path):
    rows = [row for row in questions(24) if len(row["question"]) < 20]
    found = ask_rows(reader.path, rows, tmp_path).metrics
    assert found["f1"] > 0.9 and found["loss"] < 1.0
    asked = InferencePipeline.from_path(reader.path, device="cpu").answer(
        [row["question"] for row in rows], [row["context"] for row in rows]
    )
    right = [row["answers"][0]["text"] for row in rows]
    assert sum(map(str.__eq__, asked, right)) / len(rows) == found["exact_match"]
