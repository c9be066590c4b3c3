"""Tuning on rows in memory: any method and task, with the caller's own held-out rows and encoding."""

from __future__ import annotations

import json
import math

import pytest
from datasets import Dataset

from smolora import (
    ConfigError,
    DataConfig,
    DataError,
    DataPreprocessor,
    EarlyStoppingStrategy,
    EvaluationConfig,
    ExperimentConfig,
    LoRAConfig,
    ModelConfig,
    ModelError,
    PEFTTrainer,
    TrainingConfig,
    get_preprocessor,
)
from smolora.config import FullConfig, IA3Config
from smolora.data.prompts import PromptFormat
from smolora.records.metrics_log import MetricsLog
from tests.tiny import save_tiny_encoder, save_tiny_model, tiny_tokenizer

LOOP = TrainingConfig(max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2)
PAIRS = [{"prompt": f"name {number}", "completion": "the cat"} for number in range(9)]
HELD_OUT = [{"prompt": f"who {number}", "completion": "the dog"} for number in range(3)]
LABELLED = [{"text": f"the {word} dog {i}", "label": word} for i in range(12) for word in ("good", "bad")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_tiny_model("llama", tmp_path_factory.mktemp("peft") / "base"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return str(save_tiny_encoder("bert", tmp_path_factory.mktemp("peft") / "encoder"))


def quick(model, **changes):
    return ExperimentConfig(model=model, training=LOOP, evaluation=EvaluationConfig(verdict_share=0.01), **changes)


@pytest.mark.parametrize("kind", [list, Dataset.from_list], ids=["lists", "Datasets"])
def test_rows_in_memory_become_a_run_with_their_own_held_out_rows(base, tmp_path, kind):
    model = ModelConfig(name_or_path=base, dtype="float32")
    trainer = PEFTTrainer(model, LoRAConfig(r=2), LOOP, output_dir=tmp_path / "run")
    run = trainer.train(kind(PAIRS), kind(HELD_OUT))
    report = json.loads(run.data_report.read_text())
    assert (report["train"], report["held_out"]) == (9, 3)
    last = MetricsLog(run.metrics).read()[-1]
    # The adapter that is kept has the lowest of the losses, of which one is the last.
    assert trainer.evaluate()["loss"] <= last["eval_loss"] + 1e-4
    assert trainer.save() == run.merged
    assert (run.merged / "model.safetensors").is_file()
    assert trainer.load().prompt_format.kind == "prompt_completion"


def test_what_is_evaluated_is_what_training_measured(base, tmp_path):
    trainer = PEFTTrainer(base, None, LOOP.replace(max_steps=1), output_dir=tmp_path / "run")
    run = trainer.train(PAIRS, HELD_OUT)
    found = trainer.evaluate()
    best = min(line["eval_loss"] for line in MetricsLog(run.metrics).read() if line["step"] > 0)
    assert found["loss"] == pytest.approx(best, rel=2e-2)  # The base is held in bfloat16 where that is native.
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert trainer.evaluate(HELD_OUT) == pytest.approx(found)


def test_rows_given_to_evaluate_are_all_measured_though_some_are_the_run_s_held_out_ones(base, tmp_path):
    file = tmp_path / "held.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in HELD_OUT))
    trainer = PEFTTrainer(quick(ModelConfig(name_or_path=base)), output_dir=tmp_path / "run")
    trainer.train(PAIRS, HELD_OUT)
    expected = trainer.evaluate([*HELD_OUT, PAIRS[0]])
    trainer.config = trainer.config.replace(data=DataConfig(eval_source=str(file)))
    assert trainer.evaluate([*HELD_OUT, PAIRS[0]]) == expected != trainer.evaluate([PAIRS[0]])


def test_a_classifier_on_rows_in_memory(encoder, tmp_path):
    model = ModelConfig(name_or_path=encoder, task_type="classification")
    trainer = PEFTTrainer(quick(model), LoRAConfig(r=2), output_dir=tmp_path / "run")
    trainer.train(LABELLED, LABELLED[:6])
    assert set(trainer.evaluate()) == {"loss", "accuracy", "f1"}
    assert trainer.load().labels == ("bad", "good")
    of_one_label = [row for row in LABELLED if row["label"] == "good"]
    assert 0 <= trainer.evaluate(of_one_label)["accuracy"] <= 1
    with pytest.raises(DataError, match="'fine' .* Learned are: bad, good"):
        trainer.evaluate([{"text": "the dog", "label": "fine"}])


@pytest.mark.parametrize("method", [IA3Config(), FullConfig()], ids=["ia3", "full"])
def test_other_methods_take_the_same_way(base, tmp_path, method):
    trainer = PEFTTrainer(base, method, LOOP, output_dir=tmp_path / "run")
    trainer.train(PAIRS, HELD_OUT)
    assert "perplexity" in trainer.evaluate()
    assert trainer.save() == (trainer.run.model if method.method == "full" else trainer.run.merged)


def test_a_preprocessor_names_the_columns(base, tmp_path):
    fmt = PromptFormat(kind="prompt_completion", columns={"prompt": "mr", "completion": "ref"})
    rows = [{"mr": row["prompt"], "ref": row["completion"], "text": "not this"} for row in PAIRS]
    trainer = PEFTTrainer(base, None, LOOP, output_dir=tmp_path / "run")
    run = trainer.train(rows, preprocessor=get_preprocessor("instruction", fmt=fmt, tokenizer=tiny_tokenizer()))
    assert json.loads((run.adapter / "prompt_format.json").read_text())["columns"] == {
        "prompt": "mr",
        "completion": "ref",
    }
    assert trainer.config.data == DataConfig(), "they are this training's alone"
    assert trainer.evaluate(rows)["loss"] > 0


class Shouting(DataPreprocessor):
    """Learns answers in capitals."""

    def encode(self, rows):
        return super().encode([{**row, "completion": row["completion"].upper()} for row in rows])


def test_a_preprocessor_of_ones_own_encodes_the_rows(base, tmp_path):
    fmt = PromptFormat(kind="prompt_completion", columns={"prompt": "prompt", "completion": "completion"})
    reports = []
    for name, kind in (("plain", DataPreprocessor), ("loud", Shouting)):
        trainer = PEFTTrainer(base, None, LOOP, output_dir=tmp_path / name)
        run = trainer.train(PAIRS, preprocessor=kind(fmt, tiny_tokenizer()))
        reports.append(json.loads(run.data_report.read_text()))
    assert reports[0] != reports[1], "capitals are other tokens"


def test_rows_that_dont_fit_the_preprocessor_are_refused(base, tmp_path):
    fmt = PromptFormat(kind="instruction", columns={"instruction": "instruction", "output": "output"})
    trainer = PEFTTrainer(base, None, LOOP, output_dir=tmp_path / "run")
    preprocessor = get_preprocessor("instruction", fmt=fmt, tokenizer=tiny_tokenizer())
    with pytest.raises(DataError, match="don't fit this task"):
        trainer.train([{"text": "the cat"}] * 4, preprocessor=preprocessor)
    assert not (tmp_path / "run").exists()


def test_a_strategy_is_followed(base, tmp_path):
    strategy = EarlyStoppingStrategy(patience=1, threshold=100.0)
    training = LOOP.replace(max_steps=6, eval_steps=1)
    trainer = PEFTTrainer(base, None, training, output_dir=tmp_path / "run", strategy=strategy)
    run = trainer.train(PAIRS, HELD_OUT)
    assert MetricsLog(run.metrics).read()[-1]["step"] < 6
    assert "early_stopping_patience: 1" in run.resolved_config.read_text()


def test_a_whole_configuration_is_taken_and_parts_replace_its_own(base):
    whole = quick(ModelConfig(name_or_path=base), adapter=LoRAConfig(r=4), data=DataConfig(max_length=32))
    assert PEFTTrainer(whole).config == whole
    changed = PEFTTrainer(whole, IA3Config()).config
    assert (changed.adapter.method, changed.training, changed.data) == ("ia3", LOOP, whole.data)


def test_rows_that_a_configuration_names_are_trained_on_where_none_are_given(base, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    whole = quick(ModelConfig(name_or_path=base), data=DataConfig(sources=str(file)))
    run = PEFTTrainer(whole, output_dir=tmp_path / "run").train()
    assert json.loads(run.data_report.read_text())["train"] == 9


def test_held_out_rows_without_rows_are_refused(base, tmp_path):
    with pytest.raises(ConfigError, match="eval_dataset goes with a dataset"):
        PEFTTrainer(base, output_dir=tmp_path / "run").train(None, HELD_OUT)


def test_an_empty_list_of_held_out_rows_is_refused_like_an_empty_file(base, tmp_path):
    with pytest.raises(DataError, match="no rows in eval_dataset"):
        PEFTTrainer(base, None, LOOP, output_dir=tmp_path / "run").train(PAIRS, [])


def test_without_held_out_rows_there_is_nothing_to_evaluate_on(base, tmp_path):
    trainer = PEFTTrainer(base, None, LOOP, output_dir=tmp_path / "run")
    trainer.train(PAIRS)
    with pytest.raises(DataError, match=r"held out no rows to measure on. Give some: evaluate\(rows\)"):
        trainer.evaluate()


def test_before_training_there_is_nothing_to_evaluate_or_save(base, tmp_path):
    trainer = PEFTTrainer(base, output_dir=tmp_path / "run")
    for attempt in (trainer.evaluate, trainer.save, trainer.load):
        with pytest.raises(ModelError, match=r"nothing that was trained. Call train\(...\) first"):
            attempt()
