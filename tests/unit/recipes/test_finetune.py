"""From rows to an adapter: what is learned, what is written, what is refused, and what goes on after a stop."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from pathlib import Path

import peft
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from smolora.adapters.store import load_bundle
from smolora.config import ExperimentConfig, resolve_config
from smolora.errors import ConfigError, DataError, ModelError, StoppedBySignal
from smolora.recipes.finetune import finetune, load_base, open_tuning, show_examples
from smolora.records.run_dir import RunDir
from smolora.records.staging import retire_folder
from smolora.training.callback import Callback
from smolora.training.strategies import AdaptiveLRStrategy, EarlyStoppingStrategy, TrainingStrategy
from tests.tiny import save_tiny_model

NUMBERS = ["one", "two", "three", "four", "five", "six"]


PHASED = "phases.strategy=attn,mlp,both"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model("llama", tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    pairs = [(f"{a} and {b} of {c}", f"{b} {a}") for a in NUMBERS for b in NUMBERS for c in NUMBERS[:2]]
    file.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    return file


def config(base, rows, *assignments):
    settings = [f"model.name_or_path={base}", f"data.sources={rows}", "training.learning_rate=1e-2"]
    return resolve_config(
        ExperimentConfig, assignments=[*settings, "model.dtype=float32", "training.max_steps=12", *assignments]
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base, rows):
    """A run that has ended, for tests to read."""
    return finetune(config(base, rows), tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture(scope="module")
def phased(tmp_path_factory, base, rows):
    """One in phases."""
    return finetune(config(base, rows, PHASED), tmp_path_factory.mktemp("phased") / "run")


def copy(run, folder):
    """Return a run of a test's own that has ended as another did."""
    return RunDir(shutil.copytree(run.path, folder))


@pytest.fixture
def own_rows(tmp_path, rows):
    """Rows that a test may change."""
    return Path(shutil.copy(rows, tmp_path))


class Interrupt(Callback):
    """Asks the run to stop in step 5."""

    def on_step_begin(self, trainer):
        if trainer.state.step == 4:
            os.kill(os.getpid(), signal.SIGINT)


def adapter_bytes(run):
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def test_the_adapter_learns_and_loads_in_plain_peft(base, finished):
    lines = [json.loads(line) for line in finished.metrics.read_text().splitlines()]
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"] - 0.5
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(finished.adapter)).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = load_bundle(finished.path).model(input_ids=ids).logits
        torch.testing.assert_close(plain(input_ids=ids).logits, expected)


@pytest.mark.parametrize("verb", [finetune, lambda config, out: show_examples(config)])
def test_missing_data_is_noticed_before_a_model_is_loaded(tmp_path, verb):
    with pytest.raises(DataError, match=r"no such file or folder: .*rows.jsonl"):
        verb(config(tmp_path / "no-model", tmp_path / "rows.jsonl"), tmp_path / "run")


def test_the_adapter_folder_names_base_and_prompt_format(finished):
    assert {path.name for path in finished.adapter.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "base_identity.json",
        "prompt_format.json",
    }


def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, base, rows, finished):
    with pytest.raises(StoppedBySignal, match="SIGINT after step 5"):
        finetune(config(base, rows), tmp_path / "run", callbacks=[Interrupt()])
    run = finetune(config(base, rows), tmp_path / "run", resume=True)
    assert adapter_bytes(run) == adapter_bytes(finished)


class KillAfterTraining(logging.Handler):
    """Sends SIGTERM when a run says what it reached, before its adapter is saved and its verdict given."""

    def emit(self, record):
        if record.getMessage().startswith("held-out loss"):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_after_the_last_step_stops_at_once_and_a_resume_finishes(tmp_path, base, rows, finished, caplog):
    caplog.set_level("INFO", logger="smolora")
    logger, handler = logging.getLogger("smolora"), KillAfterTraining()
    logger.addHandler(handler)
    with pytest.raises(StoppedBySignal, match=r"at once by SIGTERM. The newest checkpoint is safe in .*--resume"):
        finetune(config(base, rows), tmp_path / "run")
    logger.removeHandler(handler)
    assert not (tmp_path / "run" / "adapter_checkpoint").exists()
    run = finetune(config(base, rows), tmp_path / "run", resume=True)
    assert adapter_bytes(run) == adapter_bytes(finished)
    assert run.verdict.is_file()


@pytest.mark.parametrize("order", ["speed.max_tokens_per_batch=64", "speed.group_by_length=true"])
def test_passes_by_tokens_or_by_length_learn_and_resume_to_the_same_bits(tmp_path, base, rows, order):
    asked = config(base, rows, order)
    whole = finetune(asked, tmp_path / "whole")
    lines = [json.loads(line) for line in whole.metrics.read_text().splitlines()]
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"] - 0.5
    if asked.speed.max_tokens_per_batch:
        assert all(32 < line["input_tokens"] <= 64 for line in lines if "input_tokens" in line)
    with pytest.raises(StoppedBySignal):
        finetune(asked, tmp_path / "run", callbacks=[Interrupt()])
    assert adapter_bytes(finetune(asked, tmp_path / "run", resume=True)) == adapter_bytes(whole)


def test_a_budget_of_tokens_is_refused_where_batches_are_padded(tmp_path, rows):
    bloom = save_tiny_model("bloom", tmp_path / "bloom")
    with pytest.raises(ConfigError, match="this model trains on padded batches"):
        finetune(config(bloom, rows, "speed.max_tokens_per_batch=64"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_resumes_by_writing_what_is_missing(tmp_path, base, rows, finished):
    run = copy(finished, tmp_path / "run")
    retire_folder(run.adapter)
    assert adapter_bytes(finetune(config(base, rows), run.path, resume=True)) == adapter_bytes(finished)


def test_a_new_learning_rate_at_resume_is_honoured(tmp_path, base, rows, caplog):
    caplog.set_level("INFO", logger="smolora")
    with pytest.raises(StoppedBySignal):
        finetune(config(base, rows), tmp_path / "run", callbacks=[Interrupt()])
    run = finetune(config(base, rows, "training.learning_rate=3e-3"), tmp_path / "run", resume=True)
    lines = {line["step"]: line for line in map(json.loads, run.metrics.read_text().splitlines())}
    assert lines[10]["learning_rate"] < 3e-3
    assert "resuming with training.learning_rate = 0.003 (was 0.01)" in caplog.text


@pytest.mark.parametrize("change", ["adapter.r=4", "training.seed=1", "training.per_device_train_batch_size=4"])
def test_what_a_checkpoint_depends_on_cannot_change(base, rows, finished, change):
    with pytest.raises(ConfigError, match=f"{change.partition('=')[0]} can't change within a run"):
        finetune(config(base, rows, change), finished.path, resume=True)


def test_a_resume_on_changed_rows_is_refused_and_on_the_same_ones_elsewhere_is_not(tmp_path, base, own_rows, finished):
    run = copy(finished, tmp_path / "run")
    finetune(config(base, own_rows), run.path, resume=True)
    own_rows.write_text(own_rows.read_text().replace("five", "ten"))
    with pytest.raises(DataError, match="other data"):
        finetune(config(base, own_rows), run.path, resume=True)


def test_a_resume_on_another_base_of_the_same_shape_is_refused(tmp_path, rows, finished):
    other = save_tiny_model("llama", tmp_path / "other", seed=1)
    before = finished.resolved_config.read_text()
    with pytest.raises(ModelError, match="other base"):
        finetune(config(other, rows), finished.path, resume=True)
    assert finished.resolved_config.read_text() == before


def test_a_rejected_row_stops_the_run_before_it_is_one(tmp_path, base, own_rows):
    own_rows.write_text(own_rows.read_text() + '{"prompt": "half a row\n')
    with pytest.raises(DataError, match="1 of 73 rows can't be used"):
        finetune(config(base, own_rows), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "rejects.jsonl").read_text())["line"] == 73
    assert not RunDir.is_run(tmp_path / "run")


def test_once_its_rows_are_repaired_a_run_starts_where_it_was_refused(tmp_path, base, rows, own_rows):
    own_rows.write_text(own_rows.read_text() + '{"prompt": "half a row\n')
    with pytest.raises(DataError):
        finetune(config(base, own_rows), tmp_path / "run")
    assert finetune(config(base, rows, "training.max_steps=1"), tmp_path / "run").adapter.is_dir()


def test_an_overlong_row_is_refused_without_a_folder(tmp_path, base, rows):
    with pytest.raises(DataError, match="--overlong"):
        finetune(config(base, rows, "data.max_length=8"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_token_that_the_base_has_no_embedding_for_is_refused_without_a_folder(tmp_path, rows):
    base = save_tiny_model("llama", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.save_pretrained(base)
    with pytest.raises(ModelError, match=r"encodes '<\|end\|>' as 288"):
        finetune(config(base, rows), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unknown_target_module_is_refused_without_a_folder(tmp_path, base, rows):
    with pytest.raises(ConfigError, match="no module named 'q_projj'"):
        finetune(config(base, rows, "adapter.target_modules=q_projj"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_adapter_can_be_continued_on_new_rows(tmp_path, base, rows, finished):
    second = finetune(config(base, rows, f"adapter.path={finished.path}"), tmp_path / "second")
    starts = [json.loads(run.metrics.read_text().splitlines()[0])["eval_loss"] for run in (finished, second)]
    assert starts[1] < starts[0] - 0.5


def test_a_plain_peft_adapter_that_goes_on_on_a_base_of_another_name_is_taken_on_trust(
    tmp_path, base, rows, finished, caplog
):
    plain = shutil.copytree(finished.adapter, tmp_path / "plain")
    (plain / "base_identity.json").unlink()
    load_base(config(base, rows, f"adapter.path={plain}"))
    assert "can't be checked" not in caplog.text
    load_base(config(shutil.copytree(base, tmp_path / "other"), rows, f"adapter.path={plain}"))
    assert f"Whether {tmp_path / 'other'} holds them can't be checked" in caplog.text


def test_rows_in_memory_are_taken_in_place_of_sources(tmp_path, base):
    rows = Dataset.from_list([{"text": f"{a} then {b}"} for a in NUMBERS for b in NUMBERS])
    run = finetune(config(base, "[]"), tmp_path / "run", dataset=rows)
    assert json.loads(run.data_report.read_text())["read"] == 36


def test_a_family_that_leaks_between_packed_rows_trains_on_padded_batches_and_says_so(tmp_path, rows, caplog):
    caplog.set_level("INFO", logger="smolora")
    base = save_tiny_model("bloom", tmp_path / "bloom")
    run = finetune(config(base, rows), tmp_path / "run")
    assert "batches are padded: this model's attention can't keep rows apart" in caplog.text
    assert json.loads(run.env.read_text())["batches"] == "padded"


def test_a_frozen_base_in_bfloat16_keeps_its_adapter_in_float32(tmp_path, base, rows):
    run = finetune(config(base, rows, "model.dtype=bfloat16"), tmp_path / "run")
    weights = load_file(run.adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_the_first_examples_show_what_is_trained_on(base, rows, tmp_path):
    spans = show_examples(config(base, rows))[0]
    assert [is_target for _, is_target in spans] == [False, True]
    assert spans[1][0].endswith("<|endoftext|>")
    assert not (tmp_path / "run").exists()


def test_the_best_step_becomes_the_adapter(tmp_path, base, rows):
    class Spoil(Callback):
        def on_step_end(self, trainer, record):
            if record.step == 7:
                with torch.no_grad():
                    for parameter in trainer.parameters.values():
                        parameter.mul_(4)

    run = finetune(config(base, rows, "training.eval_steps=3"), tmp_path / "run", callbacks=[Spoil()])
    best = run.checkpoint_path(6) / "adapter_model.safetensors"
    assert adapter_bytes(run) == best.read_bytes()


def test_phases_are_certified_in_the_runs_folder(tmp_path, base, rows):
    run = finetune(config(base, rows, "phases.strategy=both->mlp->attn"), tmp_path / "run")
    reports = json.loads(run.phase_report.read_text())["phases"]
    assert [(report["start"], report["end"], report["problems"]) for report in reports] == [
        (0, 4, []),
        (4, 8, []),
        (8, 12, []),
    ]
    assert [checkpoint.step for checkpoint in run.checkpoints()][:2] == [4, 8]


def test_a_run_with_phases_resumes_to_the_same_bits(tmp_path, base, rows):
    phases = ["phases.strategy=early,late", "phases.phase1_end=5", "phases.learning_rate=restart"]
    whole = finetune(config(base, rows, *phases), tmp_path / "whole")
    with pytest.raises(StoppedBySignal):
        finetune(config(base, rows, *phases), tmp_path / "run", callbacks=[Interrupt()])
    run = finetune(config(base, rows, *phases), tmp_path / "run", resume=True)
    assert adapter_bytes(run) == adapter_bytes(whole)
    assert run.phase_report.read_text() == whole.phase_report.read_text()


@pytest.mark.parametrize("change", ["phases.strategy=early,late", "phases.moments=reset", "phases.enabled=false"])
def test_phases_cannot_change_within_a_run(base, rows, phased, change):
    with pytest.raises(ConfigError, match=f"{change.partition('=')[0]} can't change within a run"):
        finetune(config(base, rows, PHASED, change), phased.path, resume=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["adapter.target_modules=attention_only", "phases.enabled=true"], r"phase 2 \(mlp\) trains nothing"),
        (["phases.phase1_end=5", "phases.phase2_end=12"], "phase 3 starts after 12 updates and would have none"),
    ],
)
def test_phases_that_cannot_be_are_refused_without_a_folder(tmp_path, base, rows, settings, message):
    with pytest.raises(ConfigError, match=message):
        finetune(config(base, rows, *settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", ["early_stopping_patience", "plateau_patience"])
def test_a_setting_that_waits_for_held_out_losses_needs_held_out_rows(tmp_path, base, rows, setting):
    asked = config(base, rows, "data.validation_fraction=0", f"evaluation.{setting}=1")
    with pytest.raises(ConfigError, match=rf"evaluation.{setting} looks at the held-out loss, and no rows are held"):
        finetune(asked, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_strategy_needs_held_out_rows_before_there_is_a_folder(tmp_path, base, rows):
    with pytest.raises(ConfigError, match="EarlyStoppingStrategy looks at the held-out loss"):
        finetune(config(base, rows, "data.validation_fraction=0"), tmp_path / "run", strategy=EarlyStoppingStrategy())
    assert not (tmp_path / "run").exists()


class GoodAlready(TrainingStrategy):
    def should_stop_early(self, metrics):
        return True


@pytest.mark.parametrize("is_there", [False, True])
def test_a_run_that_is_refused_before_its_first_step_leaves_no_folder_where_there_was_none(
    tmp_path, base, rows, is_there
):
    if is_there:
        (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match="GoodAlready said so before the first step"):
        finetune(config(base, rows), tmp_path / "run", strategy=GoodAlready())
    assert [path.name for path in tmp_path.iterdir()] == ["run"] * is_there


def test_a_run_that_is_refused_after_a_step_keeps_what_it_wrote(tmp_path, base, rows):
    class Refuses(Callback):
        def on_log(self, trainer, record):
            raise ConfigError("not like this")

    with pytest.raises(ConfigError, match="not like this"):
        finetune(config(base, rows), tmp_path / "run", callbacks=[Refuses()])
    assert RunDir(tmp_path / "run").metrics.is_file()


def test_a_strategy_trains_as_the_settings_it_stands_for(tmp_path, base, rows):
    short = ["training.max_steps=4", "training.eval_steps=1", "evaluation.verdict_share=0"]
    words = ["training.lr_scheduler_type=cosine", "training.warmup_steps=1", "evaluation.plateau_patience=1"]
    asked = finetune(config(base, rows, *short, *words), tmp_path / "settings")
    strategy = AdaptiveLRStrategy(warmup_steps=1, patience=1)
    given = finetune(config(base, rows, *short), tmp_path / "strategy", strategy=strategy)
    assert adapter_bytes(given) == adapter_bytes(asked)
    assert given.resolved_config.read_text() == asked.resolved_config.read_text()


def test_an_evaluation_reads_a_bounded_number_of_held_out_rows(tmp_path, base, rows, caplog):
    settings = config(base, rows, f"data.eval_source={rows}", "data.max_validation_rows=10")
    with caplog.at_level(logging.INFO):
        tuning = open_tuning(settings)
    assert tuning.data.held_out is not None
    assert tuning.data.evaluated is not None
    assert (len(tuning.data.held_out), len(tuning.data.evaluated)) == (72, 10)
    assert "an evaluation during the run reads 10 of these" in caplog.text
