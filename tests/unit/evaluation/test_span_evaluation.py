"""Models for question answering are evaluated by the answers that are read back over all windows of a context."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from smolora.config import DataConfig
from smolora.data.benchmark_rows import ask_about
from smolora.data.prompts import PromptFormat
from smolora.data.spans import LONGEST_ANSWER, QuestionAnsweringPreprocessor
from smolora.data.token_dataset import TokenDataset
from smolora.errors import ConfigError, DataError
from smolora.evaluation.evaluator import ModelEvaluator
from smolora.evaluation.held_out import measure_examples
from smolora.evaluation.metrics import get_metrics_calculator
from smolora.evaluation.span_asker import SpanAsker
from smolora.evaluation.tasks import evaluate_benchmark
from smolora.inference.pipeline import InferencePipeline
from smolora.models.loading import load_model
from smolora.recipes.evaluate import evaluate
from smolora.recipes.evaluation_request import EvaluationRequest
from tests.head_runs import ask_rows
from tests.tiny import CONTEXT, save_tiny_encoder

FORM = PromptFormat(kind="qa", columns={role: role for role in ("context", "question", "answers")})
PLACES = ("river", "mill", "log", "mat")


def make_row(number):
    place = PLACES[number % 4]
    context = f"the dog {number} sat on the {place}. " + "it went away. " * (3 * (number % 3))
    starts = [context.index(place)] if number % 5 else []
    return {
        "question": f"where is {number}?",
        "context": context,
        "answers": {"text": [place] * len(starts), "answer_start": starts},
    }


ROWS = [make_row(number) for number in range(20)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model for questions that wasn't tuned here, with a random head."""
    folder = save_tiny_encoder("bert", tmp_path_factory.mktemp("questions") / "base")
    with torch.random.fork_rng():
        torch.manual_seed(16)
        head = AutoModelForQuestionAnswering.from_pretrained(folder)
        torch.nn.init.normal_(head.qa_outputs.weight)
    head.save_pretrained(folder)
    return folder


def answer_naively(plain, tokenizer, row, *, may_lack_answer=False):
    """Try all spans of all windows, by plain transformers; the windows are the tokenizer's own, a quarter shared."""
    room = CONTEXT - len(tokenizer(row["question"])["input_ids"]) - 1
    encoded = tokenizer(
        row["question"],
        row["context"],
        truncation="only_second",
        max_length=CONTEXT,
        stride=room // 4,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    best, null, text = -np.inf, np.inf, ""
    for number in range(len(encoded["input_ids"])):
        inputs = {name: torch.tensor([encoded[name][number]]) for name in ("input_ids", "token_type_ids")}
        with torch.no_grad():
            found = plain(**inputs)
        starts, ends = found.start_logits[0].tolist(), found.end_logits[0].tolist()
        null = min(null, starts[0] + ends[0])
        offsets = encoded["offset_mapping"][number]
        places = [
            place
            for place, of in enumerate(encoded.sequence_ids(number))
            if of == 1 and row["context"][slice(*offsets[place])].strip()
        ]
        for first in places:
            for last in places:
                if first <= last < first + LONGEST_ANSWER and starts[first] + ends[last] > best:
                    best = starts[first] + ends[last]
                    text = row["context"][offsets[first][0] : offsets[last][1]].strip()
    return "" if may_lack_answer and null > best else text


def test_answers_are_those_of_trying_all_spans_in_plain_transformers(model, tmp_path):
    ask_rows(model, ROWS, tmp_path, out=tmp_path / "out")
    kept = [
        json.loads(line)["prediction"] for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    ]
    plain, tokenizer = AutoModelForQuestionAnswering.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    assert kept == [answer_naively(plain, tokenizer, row) for row in ROWS]
    assert len(set(kept)) > 3


def test_a_model_that_learned_questions_without_an_answer_says_nothing_where_that_is_likelier(model):
    plain, tokenizer = AutoModelForQuestionAnswering.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    bundle = replace(load_model(model), prompt_format=FORM.model_copy(update={"may_lack_answer": True}))
    answers = [answer.text for answer in ModelEvaluator(bundle).answer([ask_about(row, ()) for row in ROWS])]
    assert answers == [answer_naively(plain, tokenizer, row, may_lack_answer=True) for row in ROWS]
    assert 0 < answers.count("") < len(answers)
    find = InferencePipeline(bundle).find_answer
    spans = [find(row["question"], row["context"]) for row in ROWS]
    assert ["" if span.null_score > span.score else span.text for span in spans] == answers


def test_the_loss_is_that_of_the_windows(model, tmp_path):
    bundle = load_model(model)
    preprocessor = QuestionAnsweringPreprocessor(FORM, bundle.tokenizer)
    windows = [window.example for row in ROWS for window in preprocessor.encode_windows(row, CONTEXT)]
    result = ask_rows(model, ROWS, tmp_path)
    assert len(windows) > len(ROWS)
    assert result.metrics["loss"] == pytest.approx(measure_examples(bundle, TokenDataset(windows))["loss"], rel=1e-5)
    assert set(result.metrics) == {"exact_match", "f1", "loss"}


def test_the_best_reference_counts_and_no_answer_is_right_where_there_is_none():
    found = get_metrics_calculator("squad").compute(
        ["the Eagle, by the river", "nowhere", ""], [["Eagle", "an eagle by river"], [""], [""]]
    )
    # Without articles and punctuation: {eagle by river} against {eagle} is 1/2, against {eagle by river} 1.
    assert found == {"exact_match": pytest.approx(2 / 3), "f1": pytest.approx(2 / 3)}
    half = get_metrics_calculator("squad").compute(["the Eagle, by the river"], [["Eagle", "a mill"]])
    assert half == {"exact_match": 0.0, "f1": 0.5}


def test_answers_dont_depend_on_the_batch(model):
    bundle = load_model(model)
    rows = [ask_about(row, row["answers"]["text"]) for row in ROWS]
    one, many = (ModelEvaluator(bundle, batch_size=size).answer(rows) for size in (1, 16))
    assert [answer.text for answer in one] == [answer.text for answer in many]
    losses = [torch.tensor([answer.loss_sum for answer in answers]) for answers in (one, many)]
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-4)  # Padded rows are rounded otherwise.


def test_a_file_of_squad_is_asked_as_a_benchmark_and_as_rows(model, tmp_path):
    answer = {"text": "river", "answer_start": 15}
    paragraph = {"context": "the dog sat by river", "qas": [{"id": "1", "question": "where?", "answers": [answer]}]}
    file = tmp_path / "dev-v1.1.json"
    file.write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": [paragraph]}]}))
    own = evaluate(EvaluationRequest(model=str(model), data=DataConfig(sources=(str(file),))))
    assert evaluate_benchmark("squad", model, data_dir=tmp_path).metrics == own.metrics
    del answer["answer_start"]
    file.write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": [paragraph]}]}))
    with pytest.raises(DataError, match="row 1: answers are"):
        evaluate_benchmark("squad", model, data_dir=tmp_path)


def test_a_question_that_leaves_no_room_is_named(model, tmp_path):
    long = {**ROWS[1], "question": "where is it? " * 20}
    with pytest.raises(DataError, match=rf"own.jsonl:2: the question takes \d+ of {CONTEXT} tokens"):
        ask_rows(model, [ROWS[0], long], tmp_path)
    asker = SpanAsker(load_model(model), batch_size=2)
    assert [asker.has_room(ask_about(row, ())) for row in (ROWS[0], long)] == [True, False]


def test_rows_without_questions_are_refused(model, tmp_path):
    (tmp_path / "sst2_test.jsonl").write_text(json.dumps({"text": "good", "label": 1}))
    with pytest.raises(ConfigError, match="sst2-test has no questions about contexts, and this model is a model for q"):
        evaluate_benchmark("sst2", model, data_dir=tmp_path)
