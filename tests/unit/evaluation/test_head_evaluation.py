"""Classifiers are evaluated by their head: the same loop, metrics and files as for models that write."""

from __future__ import annotations

import json
from shutil import copytree

import pytest
import torch
from datasets import ClassLabel, Dataset
from transformers import AutoModelForSequenceClassification

from smolora.adapters.store import load_bundle
from smolora.config import (
    DataConfig,
    EvaluationConfig,
    ExperimentConfig,
    LoRAConfig,
    ModelConfig,
    TrainingConfig,
    resolve_config,
)
from smolora.data.benchmark_rows import TEXTS, BenchmarkRow
from smolora.errors import ConfigError, DataError
from smolora.evaluation.comparison import Budget
from smolora.evaluation.evaluator import ModelEvaluator
from smolora.evaluation.paired_answers import compare_heads
from smolora.evaluation.tasks import evaluate_benchmark
from smolora.generation.sampling import SamplingSettings
from smolora.models.loading import load_model
from smolora.recipes.evaluate import evaluate
from smolora.recipes.evaluation_request import EvaluationRequest
from smolora.recipes.finetune import finetune
from smolora.recipes.measure import measure
from smolora.records.run_dir import RunDir
from tests.head_runs import ask_rows, write_rows
from tests.tiny import CONTEXT, save_tiny_encoder, save_tiny_model

WORDS = ("good", "fine", "bad", "poor")


def reviews(count=60):
    return [{"text": f"the {WORDS[i % 4]} dog {i}", "label": "yes" if i % 4 < 2 else "no"} for i in range(count)]


def train(folder, family, rows, **data):
    save = save_tiny_encoder if family == "bert" else save_tiny_model
    config = ExperimentConfig(
        model=ModelConfig(name_or_path=str(save(family, folder / "base")), task_type="classification"),
        data=DataConfig(sources=(str(write_rows(folder / "rows.jsonl", rows)),), **data),
        adapter=LoRAConfig(r=2),
        training=TrainingConfig(max_steps=30, learning_rate=1e-2),
        evaluation=EvaluationConfig(verdict_share=0),
    )
    return finetune(config, folder / "run").path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A classifier that has learned which words are good."""
    return train(tmp_path_factory.mktemp("bert"), "bert", reviews())


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A classifier of pairs, with SICK's labels."""
    labels = ("entailment", "neutral", "contradiction")
    rows = [{"premise": f"a {i}", "hypothesis": f"b {i}", "label": labels[i % 3]} for i in range(60)]
    return train(tmp_path_factory.mktemp("pairs"), "bert", rows)


def test_the_head_answers_with_the_loss_and_what_always_one_label_would_reach(run, tmp_path):
    result = ask_rows(run, reviews(41), tmp_path, out=tmp_path / "out")
    assert set(result.metrics) == {"accuracy", "f1", "majority_accuracy", "loss"}
    assert result.metrics["accuracy"] == 1.0 and result.metrics["loss"] < 0.5
    assert result.metrics["majority_accuracy"] == pytest.approx(21 / 41)
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [line["prediction"] for line in lines] == [row["label"] for row in reviews(41)]
    assert sum(line["loss_sum"] for line in lines) / 41 == pytest.approx(result.metrics["loss"])


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_answers_dont_depend_on_the_batch(family, tmp_path):
    folder = (save_tiny_encoder if family == "bert" else save_tiny_model)(family, tmp_path / "base")
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    AutoModelForSequenceClassification.from_pretrained(folder, **names).save_pretrained(folder)
    bundle = load_model(folder)
    rows = [BenchmarkRow("", ("yes",), {TEXTS: (f"the {w} dog{' the cat' * n}",)}) for n, w in enumerate(WORDS * 2)]
    one = ModelEvaluator(bundle, batch_size=1).answer(rows)
    many = ModelEvaluator(bundle, batch_size=8).answer(rows)
    assert [a.label for a in one] == [a.label for a in many]
    losses = [torch.tensor([a.loss_sum for a in answers]) for answers in (one, many)]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-4)  # Padded rows are rounded otherwise.


@pytest.mark.parametrize(("seconds", "num_rows"), [(-1.0, 0), (60.0, 2)])
def test_a_pair_of_heads_is_asked_where_there_is_time(run, seconds, num_rows):
    rows = [BenchmarkRow("", ("yes",), {TEXTS: (f"the {word} dog",)}) for word in WORDS[:2]]
    found = compare_heads(load_bundle(run), rows, budget=Budget(seconds))
    assert (found.num_rows, len(found.samples), found.reached) == (num_rows, num_rows, num_rows / 2)


def test_a_stopped_evaluation_goes_on_where_it_was(run, tmp_path):
    whole = ask_rows(run, reviews(), tmp_path, out=tmp_path / "out")
    file = tmp_path / "out" / "predictions.jsonl"
    kept = file.read_text().splitlines(keepends=True)
    file.write_text("".join(kept[:20]))
    assert ask_rows(run, reviews(), tmp_path, out=tmp_path / "out").metrics == pytest.approx(whole.metrics, rel=1e-4)
    found = file.read_text().splitlines(keepends=True)
    assert found[:20] == kept[:20]
    for line, expected in zip(map(json.loads, found), map(json.loads, kept), strict=True):
        losses = [(row.pop("loss_sum"), row["scores"].pop("loss")) for row in (line, expected)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-5)  # Rows of another batch are rounded otherwise.
        assert line == expected


def test_labels_that_the_head_does_not_know_are_refused_with_their_counts(run, tmp_path):
    rows = [*reviews(4), {"text": "a", "label": "maybe"}, {"text": "b", "label": "maybe"}]
    with pytest.raises(DataError, match=r"'maybe' \(2 rows\).*no, yes"):
        ask_rows(run, rows, tmp_path)


def test_labels_may_differ_in_case(run, tmp_path):
    rows = [{**row, "label": row["label"].upper()} for row in reviews(8)]
    assert ask_rows(run, rows, tmp_path).metrics["accuracy"] == 1.0


def test_numbers_of_rows_are_refused_where_the_order_of_labels_is_ours(run, tmp_path):
    with pytest.raises(DataError, match=r"'1' \(1 row\)"):
        ask_rows(run, [{"text": "good", "label": 1}], tmp_path)


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A classifier whose rows had numbers with names, in another order than that of its head."""
    return train_numbered(tmp_path_factory.mktemp("named"), ("yes", "no"))


def train_numbered(folder, names):
    """Train on reviews whose labels are numbers: 0 is the first name."""
    rows = [{"text": row["text"], "label": int(row["label"] == "no")} for row in reviews()]
    Dataset.from_list(rows).cast_column("label", ClassLabel(names=list(names))).to_parquet(folder / "rows.parquet")
    config = ExperimentConfig(
        model=ModelConfig(name_or_path=str(save_tiny_encoder("bert", folder / "base")), task_type="classification"),
        data=DataConfig(sources=(str(folder / "rows.parquet"),)),
        adapter=LoRAConfig(r=2),
        training=TrainingConfig(max_steps=30, learning_rate=1e-2),
        evaluation=EvaluationConfig(verdict_share=0),
    )
    return finetune(config, folder / "run").path


def number(row):
    return {**row, "label": int(row["label"] == "no")}


def test_numbers_of_rows_stand_for_the_names_that_the_training_rows_had(named, tmp_path):
    by_name = ask_rows(named, reviews(), tmp_path)
    assert by_name.metrics["accuracy"] == 1.0
    for rows in (map(number, reviews()), [*map(number, reviews(30)), *reviews()[30:]]):
        found = ask_rows(named, list(rows), tmp_path)
        assert found.metrics == by_name.metrics
        assert found.num_trained_on == by_name.num_trained_on


def test_the_trainer_reads_such_numbers_too(named):
    bundle = load_bundle(named)
    config = resolve_config(ExperimentConfig, file=RunDir(named).resolved_config)
    rows = Dataset.from_list([number(row) for row in reviews()])
    assert bundle.prompt_format.label_names == ("yes", "no")
    assert measure(config, named, dataset=rows)["accuracy"] == 1.0


def test_an_adapter_that_is_trained_further_keeps_the_names_and_reads_numbers_by_them(named, tmp_path):
    file = write_rows(tmp_path / "more.jsonl", [number(row) for row in reviews()])
    config = resolve_config(ExperimentConfig, file=RunDir(named).resolved_config)
    further = config.replace(
        data=DataConfig(sources=(str(file),)),
        adapter=config.adapter.replace(path=str(named)),
        training=config.training.replace(max_steps=2),
    )
    run = finetune(further, tmp_path / "further").path
    assert ask_rows(run, [number(row) for row in reviews()], tmp_path).metrics["accuracy"] == 1.0


def test_a_number_without_a_name_is_refused_with_those_that_have_one(named, tmp_path):
    with pytest.raises(DataError, match=r"'2' \(1 row\).*numbers from 0 \(yes\) to 1 \(no\) stand for names") as error:
        ask_rows(named, [*map(number, reviews(4)), {"text": "a", "label": 2}], tmp_path)
    assert "\n" not in str(error.value)


def test_answers_of_a_run_from_before_label_names_are_still_its_own(named, tmp_path):
    ask_rows(named, reviews(4), tmp_path, out=tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert "label_names" not in kept["identity"]["form"]  # What identifies it is as it was written then.


def test_a_label_that_is_a_number_itself_is_no_other_label_s_number(tmp_path):
    run = train_numbered(tmp_path, ("1", "0"))
    rows = [{**row, "label": str(1 - number(row)["label"])} for row in reviews()]
    assert ask_rows(run, rows, tmp_path).metrics["accuracy"] == 1.0
    assert ask_rows(run, [{**row, "label": int(row["label"])} for row in rows], tmp_path).metrics["accuracy"] == 1.0


def test_a_form_from_before_label_names_refuses_numbers_as_it_did(named, tmp_path):
    run = tmp_path / "old"
    copytree(named, run)
    file = run / "adapter_checkpoint" / "prompt_format.json"
    form = json.loads(file.read_text())
    del form["label_names"]
    file.write_text(json.dumps(form))
    with pytest.raises(DataError, match=r"'0' \(2 rows\)"):
        ask_rows(run, [number(row) for row in reviews(4)], tmp_path)


def test_a_classifier_that_was_not_tuned_here_takes_the_numbers_of_its_outputs(tmp_path):
    folder = save_tiny_encoder("bert", tmp_path / "base")
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).save_pretrained(folder)
    by_number = ask_rows(folder, [{"text": "good", "label": 1}], tmp_path)
    by_name = ask_rows(folder, [{"text": "good", "label": "LABEL_1"}], tmp_path)
    assert by_number.metrics == by_name.metrics


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_it_takes_them_too_where_the_rows_have_names_for_their_numbers(tmp_path, suffix):
    folder = save_tiny_encoder("bert", tmp_path / "base")
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).save_pretrained(folder)
    dataset = Dataset.from_list([{"text": "good", "label": 1}]).cast_column("label", ClassLabel(names=["neg", "pos"]))
    if suffix == "parquet":
        dataset.to_parquet(tmp_path / "rows.parquet")
    else:
        dataset.save_to_disk(tmp_path / "rows.arrow")
    data = DataConfig(sources=(str(tmp_path / f"rows.{suffix}"),))
    found = evaluate(EvaluationRequest(model=str(folder), data=data))
    assert found.metrics == ask_rows(folder, [{"text": "good", "label": 1}], tmp_path).metrics


def test_rows_past_the_context_are_cut_and_counted(run, tmp_path, caplog):
    ask_rows(run, [*reviews(4), {"text": "the dog " * CONTEXT, "label": "yes"}], tmp_path)
    assert f"cut at the model's context of {CONTEXT} tokens: 1 row." in caplog.text


@pytest.mark.parametrize(
    "given", [{"settings": SamplingSettings(temperature=0.5)}, {"by_likelihood": True}], ids=["settings", "likelihood"]
)
def test_what_shapes_written_answers_is_refused(run, tmp_path, given):
    with pytest.raises(ConfigError, match="would change nothing: this model is a text classifier"):
        ask_rows(run, reviews(4), tmp_path, **given)


def test_a_benchmark_is_asked_with_its_texts_where_the_model_was_trained_on_texts(pairs, tmp_path):
    rows = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "gold_label": "neutral"} for i in range(6)]
    write_rows(tmp_path / "multinli_1.0_dev_matched.jsonl", rows)
    result = evaluate_benchmark("multi_nli", pairs, data_dir=tmp_path, out=tmp_path / "out")
    own = ask_rows(
        pairs, [{"premise": r["sentence1"], "hypothesis": r["sentence2"], "label": "neutral"} for r in rows], tmp_path
    )
    assert result.metrics["loss"] == own.metrics["loss"] and result.num_rows == 6


def test_a_benchmark_is_asked_with_its_prompts_where_the_model_was_trained_on_those(tmp_path):
    names = {"yes": "positive", "no": "negative"}
    rows = [{"prompt": f"Review: {row['text']}\nSentiment:", "completion": names[row["label"]]} for row in reviews()]
    run = train(tmp_path, "bert", rows)
    write_rows(tmp_path / "sst2_test.jsonl", [{**row, "label": int(row["label"] == "yes")} for row in reviews()])
    assert evaluate_benchmark("sst2", run, data_dir=tmp_path).metrics == ask_rows(run, rows, tmp_path).metrics


def test_a_benchmark_of_other_texts_or_without_labels_is_refused(run, pairs, tmp_path):
    write_rows(tmp_path / "sst2_test.jsonl", [{"text": "good", "label": 1}])
    with pytest.raises(ConfigError, match="trained on 2 texts a row, and sst2-test has 1"):
        evaluate_benchmark("sst2", pairs, data_dir=tmp_path)
    with pytest.raises(DataError, match=r"'positive' \(1 row\)"):
        evaluate_benchmark("sst2", run, data_dir=tmp_path)
    write_rows(tmp_path / "test.jsonl", [{"dialogue": "A: hi", "summary": "Hi."}])
    with pytest.raises(ConfigError, match="samsum-test has no labels"):
        evaluate_benchmark("samsum", run, data_dir=tmp_path)


def test_columns_are_those_of_the_training_unless_they_are_named(run, tmp_path):
    file = write_rows(
        tmp_path / "own.jsonl", [{"review": row["text"], "text": "x", "kind": row["label"]} for row in reviews(8)]
    )
    data = DataConfig(sources=(str(file),), text_field="review", label_field="kind")
    assert evaluate(EvaluationRequest(model=str(run), data=data)).metrics["accuracy"] == 1.0
