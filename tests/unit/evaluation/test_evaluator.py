"""Asking a model, keeping what it said, and going on after a stop."""

from __future__ import annotations

import json
import logging
import tracemalloc
from dataclasses import replace

import pytest

from smolora.config import DataConfig
from smolora.data.benchmark_rows import BenchmarkRow
from smolora.errors import ConfigError, DataError, FolderInUseError
from smolora.evaluation.evaluator import GREEDY, ModelEvaluator
from smolora.evaluation.likelihood import LikelihoodScorer
from smolora.evaluation.metric import Answer, Resources
from smolora.evaluation.metrics import MetricsCalculator
from smolora.evaluation.prediction_log import PredictionLog
from smolora.evaluation.row_source import open_data
from smolora.evaluation.scoring import score_answers
from smolora.generation.text_generator import TextGenerator
from smolora.models.loading import load_model
from tests.tiny import CONTEXT, save_tiny_encoder

SHORT = GREEDY.replace(max_new_tokens=6)
METRICS = ("bleu", "exact_match", "distinct", "loss")


def evaluate(bundle, rows, *, log=None, batch_size=2, progress=lambda done: None, settings=SHORT):
    evaluator = ModelEvaluator(bundle, settings=settings, batch_size=batch_size)
    return evaluator.evaluate_dataset(rows, MetricsCalculator(METRICS), log=log, progress=progress)


def read(log):
    return [json.loads(line) for line in log.predictions.read_text().splitlines()]


class Stop(Exception):
    """What a person who presses Ctrl-C does, in a test."""


def stop_after(num_rows):
    def listen(done):
        if done >= num_rows:
            raise Stop

    return listen


@pytest.mark.parametrize("settings", [SHORT, SHORT.replace(num_beams=2)], ids=["greedy", "beams"])
def test_answers_are_the_generators_one_by_one(bundle, rows, tmp_path, settings):
    log = PredictionLog(tmp_path, {})
    evaluate(bundle, rows, log=log, batch_size=4, settings=settings)
    generator = TextGenerator(bundle)
    assert [line["prediction"] for line in read(log)] == [
        generator.generate(row.prompt, settings=settings)[0] for row in rows
    ]


def test_numbers_dont_depend_on_the_batch(bundle, rows):
    one, many = evaluate(bundle, rows, batch_size=1).metrics, evaluate(bundle, rows, batch_size=16).metrics
    assert one == pytest.approx(many, rel=1e-5)  # Losses of packed rows are rounded otherwise.


def test_rows_are_kept_with_answers_and_scores(bundle, rows, tmp_path):
    log = PredictionLog(tmp_path, {"model": "m"})
    result = evaluate(bundle, rows, log=log)
    lines = read(log)
    assert len(lines) == result.num_rows == 20
    assert lines[1].keys() >= {"prompt", "references", "prediction", "scores", "loss_sum", "num_tokens"}
    assert lines[1]["references"] == ["yes", "no it isn't"]
    matches = [line["scores"]["exact_match"] for line in lines]
    assert sum(matches) / len(matches) == result.metrics["exact_match"]
    kept = json.loads(log.evaluation.read_text())
    assert kept["identity"] == {"model": "m"}
    assert kept["metrics"] == result.metrics


@pytest.mark.parametrize(
    "torn", ['{"prediction": "torn', "5\n", '{"prediction": 5}\n', '{"prediction": "x", "labels": null}\n']
)
def test_a_stopped_evaluation_goes_on_and_asks_nothing_again(bundle, rows, tmp_path, torn):
    whole, log = PredictionLog(tmp_path / "whole", {}), PredictionLog(tmp_path / "stopped", {})
    expected = evaluate(bundle, rows, log=whole)
    with pytest.raises(Stop):
        evaluate(bundle, rows, log=log, progress=stop_after(16))
    with log.predictions.open("a") as file:
        file.write(torn)
    kept = log.predictions.read_text().replace('"prediction": "', '"prediction": "kept ', 1)
    log.predictions.write_text(kept)
    result = evaluate(bundle, rows, log=log)
    assert read(log)[0]["prediction"].startswith("kept ")
    assert [line["prediction"] for line in read(log)][1:] == [line["prediction"] for line in read(whole)][1:]
    assert (result.num_rows, result.metrics["loss"]) == (20, pytest.approx(expected.metrics["loss"]))
    assert result.scores["loss"].low == pytest.approx(expected.scores["loss"].low)


def test_an_evaluation_of_something_else_begins_anew(bundle, rows, tmp_path):
    evaluate(bundle, rows, log=PredictionLog(tmp_path, {"temperature": 0}))
    log = PredictionLog(tmp_path, {"temperature": 1})
    assert evaluate(bundle, rows[:3], log=log).num_rows == len(read(log)) == 3


def test_a_finished_evaluation_of_something_else_is_discarded_with_a_warning(bundle, rows, tmp_path, caplog):
    evaluate(bundle, rows[:1], log=PredictionLog(tmp_path, {"temperature": 0, "rows": 1}))
    with caplog.at_level(logging.WARNING, logger="smolora.evaluation"):
        evaluate(bundle, rows[:1], log=PredictionLog(tmp_path, {"temperature": 0, "rows": 1}))
        assert caplog.text == ""
        evaluate(bundle, rows[:1], log=PredictionLog(tmp_path, {"temperature": 1, "rows": 1}))
    assert "held another evaluation, which is discarded: other temperature." in caplog.text


def test_predictions_of_a_persons_own_are_not_written_over(bundle, rows, tmp_path):
    log = PredictionLog(tmp_path, {})
    log.predictions.write_text("mine\n")
    with pytest.raises(ConfigError, match="is no evaluation's"):
        evaluate(bundle, rows, log=log)
    assert log.predictions.read_text() == "mine\n"


def test_two_evaluations_dont_write_into_one_folder(bundle, rows, tmp_path):
    log = PredictionLog(tmp_path, {})
    with log.locked(), pytest.raises(FolderInUseError):
        evaluate(bundle, rows, log=log)


def test_the_likeliest_label_is_the_answer(bundle, rows):
    rows = [replace(row, references=("yes",)) for row in rows]
    evaluator = ModelEvaluator(bundle, labels=("yes", "no"))
    answers = evaluator.answer(rows)
    for answer, row in zip(answers, rows, strict=True):
        yes, no = LikelihoodScorer(bundle).measure([(row.prompt, "yes"), (row.prompt, "no")])
        assert answer.label == answer.text == ("yes" if yes.loss_sum <= no.loss_sum else "no")
        assert answer.loss_sum == pytest.approx(yes.loss_sum, rel=1e-5)
    calculator = MetricsCalculator(["labels"], resources=Resources(labels=("yes", "no")))
    found = evaluator.evaluate_dataset(rows, calculator)
    assert found.metrics["accuracy"] == sum(answer.label == "yes" for answer in answers) / 20


def test_rows_without_a_prompt_have_a_loss_and_no_answer(bundle):
    [text, asked] = ModelEvaluator(bundle, settings=SHORT).answer(
        [BenchmarkRow("", ("the cat sat",)), BenchmarkRow("the cat", ("sat",))]
    )
    assert (text.text, text.num_tokens > 0) == ("", True)
    assert asked.text == TextGenerator(bundle).generate("the cat", settings=SHORT)[0]


def test_a_prompt_past_the_context_is_an_error(bundle):
    long = BenchmarkRow("\n" * 100, ("yes",))
    with pytest.raises(DataError, match=f"row 1: .* 100 tokens leaves no room for an answer .* {CONTEXT} tokens"):
        evaluate(bundle, [long])


def test_a_piece_of_a_text_that_goes_on_is_scored_without_an_end(bundle, tmp_path):
    file = tmp_path / "pieces.jsonl"
    file.write_text('{"text": "the cat", "space_to_next": " "}\n{"text": "the cat"}\n')
    data = DataConfig(sources=(str(file),), deduplicate=False)
    rows = list(open_data(data, trained=None, tokenizer=bundle.tokenizer).iter_rows())
    going_on, ended = ModelEvaluator(bundle, settings=SHORT).answer(rows)
    assert ended.num_tokens == going_on.num_tokens + 1
    assert ended.loss_sum > going_on.loss_sum


def test_an_encoder_reads_a_prompt_of_the_whole_context(tmp_path):
    bundle = load_model(save_tiny_encoder("bart", tmp_path), task="seq2seq")
    fits, too_long = (BenchmarkRow("\n" * count, ("yes",)) for count in (bundle.context - 1, bundle.context))
    assert TextGenerator(bundle).count_tokens(fits.prompt) == bundle.context
    assert evaluate(bundle, [fits]).num_rows == 1
    with pytest.raises(DataError, match=f"prompt of {bundle.context + 1} tokens"):
        evaluate(bundle, [too_long])


def test_the_row_of_a_prompt_past_the_context_is_named(bundle, rows, tmp_path):
    long, log = BenchmarkRow("\n" * 100, ("yes",)), PredictionLog(tmp_path, {})
    with pytest.raises(DataError, match="row 10: .*--num-samples 9 evaluates the rows before it"):
        evaluate(bundle, [*rows[:9], long], log=log, batch_size=1)
    assert len(read(log)) == 8
    with pytest.raises(DataError, match=r"a\.jsonl:7: its prompt of 100 tokens"):
        evaluate(bundle, [replace(long, origin="a.jsonl:7")])


def test_sampled_answers_with_a_seed_are_the_same_again(bundle, rows, tmp_path):
    drawn = SHORT.replace(temperature=1.0, seed=3)
    logs = [PredictionLog(tmp_path / name, {}) for name in "ab"]
    for log in logs:
        evaluate(bundle, rows, log=log, settings=drawn)
    assert read(logs[0]) == read(logs[1])


def test_sampled_answers_depend_neither_on_the_batch_nor_on_a_stop(bundle, tmp_path):
    rows = [BenchmarkRow("the cat" if number % 2 else f"name {number}", ("sat",)) for number in range(24)]
    drawn = SHORT.replace(temperature=1.0, seed=3)
    one, many, stopped = (PredictionLog(tmp_path / name, {}) for name in ("one", "many", "stopped"))
    evaluate(bundle, rows, log=one, settings=drawn, batch_size=1)
    evaluate(bundle, rows, log=many, settings=drawn, batch_size=16)
    with pytest.raises(Stop):
        evaluate(bundle, rows, log=stopped, settings=drawn, batch_size=1, progress=stop_after(8))
    evaluate(bundle, rows, log=stopped, settings=drawn, batch_size=16)
    answers = [[line["prediction"] for line in read(log)] for log in (one, many, stopped)]
    assert answers[0] == answers[1] == answers[2]
    assert len(set(answers[0][1::2])) > 1  # Rows with one prompt are drawn apart.


def test_a_label_past_the_context_is_an_error(bundle):
    row = BenchmarkRow("\n" * CONTEXT, ("yes",))
    message = f"row 5: its prompt of {CONTEXT} tokens leaves no room for the labels"
    with pytest.raises(DataError, match=message):
        ModelEvaluator(bundle, labels=("yes", "no")).answer([row], first=4)


def test_references_past_the_context_are_counted_and_said_once(bundle, caplog):
    rows = [BenchmarkRow("", ("\n" * (CONTEXT + 9), "sat"))] * 5
    with caplog.at_level(logging.WARNING, logger="smolora.evaluation"):
        evaluate(bundle, rows, batch_size=1)
    assert [record.getMessage()[:21] for record in caplog.records] == ["5 references are cut "]


@pytest.mark.parametrize("batch_size", [0, -1])
def test_at_least_a_row_is_answered_at_a_time(bundle, batch_size):
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        ModelEvaluator(bundle, batch_size=batch_size)


def test_memory_does_not_grow_with_the_rows(tmp_path):
    def peak(num_rows):
        rows = (BenchmarkRow(f"question {number}", (f"answer {number}",)) for number in range(num_rows))
        tracemalloc.start()
        score_answers(
            lambda part: [Answer(row.prompt) for row in part],
            rows,
            MetricsCalculator(["squad", "loss"]),
            at_once=64,
            log=PredictionLog(tmp_path / str(num_rows), {}),
        )
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    few = peak(256)
    assert peak(2048) < 1.1 * few
