"""What a run's folder lets in, and what it says to the rest; what a stop at a bad moment leaves in it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from smolora.config import ExperimentConfig, PretrainConfig, resolve_config
from smolora.errors import ConfigError, DataError, FolderInUseError, ModelError, StorageError
from smolora.recipes.finetune import finetune
from smolora.recipes.merge import merge
from smolora.recipes.pretrain import pretrain
from smolora.recipes.run_folder import fingerprint_settings
from smolora.records.run_dir import RunDir
from smolora.records.staging import hash_folder
from smolora.training.callback import Callback
from tests.tiny import save_tiny_model

NUMBERS = ["one", "two", "three", "four", "five", "six"]

HOLDER = """
import sys
from smolora.records.run_dir import RunDir
with RunDir(sys.argv[1]).locked():
    print("locked", flush=True)
    sys.stdin.read()
"""


class Crash(Callback):
    """Fails in one step, before its update, as a kill would end it."""

    def __init__(self, step):
        self.step = step

    def on_gradients(self, trainer):
        if trainer.state.step + 1 == self.step:
            raise ZeroDivisionError


class Damage(Callback):
    """Flips a bit of an older checkpoint, the best so far, in the last step."""

    def __init__(self, run, step):
        self.run, self.step = run, step

    def on_evaluate(self, trainer, eval_loss):
        if trainer.state.step == trainer.state.total_steps:
            trainer.state.best_step = self.step
            flip_a_bit(self.run.checkpoint_path(self.step) / "adapter_model.safetensors")


class Prefer(Callback):
    """Calls an earlier step the best one, in the last step."""

    def __init__(self, step):
        self.step = step

    def on_evaluate(self, trainer, eval_loss):
        if trainer.state.step == trainer.state.total_steps:
            trainer.state.best_step = self.step


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_can_not_be_made_is_noticed_before_anything_is_read(tmp_path, resume):
    (tmp_path / "file").write_text("")
    config = resolve_config(PretrainConfig, assignments=[f"data.sources={tmp_path / 'missing.txt'}"])
    with pytest.raises(StorageError, match=rf"can't write {tmp_path / 'file' / 'run'}: .*Part of the path is a file"):
        pretrain(config, tmp_path / "file" / "run", resume=resume)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model("llama", tmp_path_factory.mktemp("run_folder") / "base")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", NUMBERS)


def write_rows(file, words):
    pairs = [(f"{a} and {b} of {c}", f"{b} {a}") for a in words for b in words for c in words[:2]]
    file.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    return file


@pytest.fixture(scope="module")
def tuning(base, rows):
    """Return a function that gives the configuration of a short tuning run."""

    def tuning(*assignments):
        settings = [f"model.name_or_path={base}", f"data.sources={rows}", "model.dtype=float32", "adapter.r=2"]
        steps = [
            "training.learning_rate=1e-2",
            "training.max_steps=6",
            "training.logging_steps=1",
        ]
        return resolve_config(ExperimentConfig, assignments=[*settings, *steps, *assignments])

    return tuning


@pytest.fixture
def pretraining(tmp_path):
    """The configuration of a short pretraining run."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(NUMBERS * 40))
    shape = ["gpt.num_layers=1", "gpt.num_heads=2", "gpt.width=16", "gpt.context=16"]
    steps = ["training.max_steps=3", "training.learning_rate=1e-2"]
    return resolve_config(PretrainConfig, assignments=[f"data.sources={text}", *shape, *steps])


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


@pytest.fixture(scope="module")
def finished(tuning, tmp_path_factory):
    """A tuning run that has ended, for tests to copy."""
    return finetune(tuning(), tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def tuned(finished, run):
    """A tuning run of this test's own that has ended."""
    shutil.copytree(finished.path, run.path)
    return run


@pytest.fixture
def hold():
    """Return a function that lets another process write in a folder until the test ends."""
    holders = []

    def hold(folder):
        command = [sys.executable, "-c", HOLDER, str(folder)]
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        holders.append(holder)
        assert holder.stdout.readline() == b"locked\n"

    yield hold
    for holder in holders:
        holder.communicate(timeout=60)


def read_metrics(run):
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def snapshot(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_train_does_not_resume_a_pretraining_run(run, tuning, pretraining):
    pretrain(pretraining, run.path)
    before = snapshot(run.path)
    with pytest.raises(ConfigError, match="holds a run of pretrain, which goes on with: smolora pretrain --resume -o"):
        finetune(tuning(), run.path, resume=True)
    assert snapshot(run.path) == before


def test_pretrain_does_not_resume_a_tuning_run(tuned, tuning, pretraining):
    before = snapshot(tuned.path)
    with pytest.raises(ConfigError, match="holds a run of train, which goes on with: smolora train --resume -o"):
        pretrain(pretraining, tuned.path, resume=True)
    assert snapshot(tuned.path) == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_in_use_is_said_before_anything_else_of_it(run, tuning, hold, resume):
    run.path.mkdir()
    run.resolved_config.write_text("nonsense: [")
    hold(run.path)
    with pytest.raises(FolderInUseError, match="another process is writing in"):
        finetune(tuning(), run.path, resume=resume)


def test_a_folder_in_use_that_holds_no_run_yet_is_refused(run, tuning, hold):
    hold(run.path)
    with pytest.raises(FolderInUseError, match="another process is writing in"):
        finetune(tuning(), run.path)
    assert [entry.name for entry in run.path.iterdir()] == ["run.lock"]


def test_a_run_that_is_being_trained_is_not_merged(tuned, tuning, hold):
    hold(tuned.path)
    with pytest.raises(FolderInUseError, match="another process is writing in"):
        merge(tuned.path)
    assert not tuned.merged.exists()


def test_a_merged_model_stays_where_a_resume_ends_with_the_same_adapter(tuned, tuning):
    merge(tuned.path)
    finetune(tuning(), tuned.path, resume=True)
    assert tuned.merged.is_dir()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX processes")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_no_kill_leaves_a_merged_model_beside_a_newer_adapter(tuned, tuning):
    def die(event, arguments):
        if event == "shutil.rmtree" and Path(arguments[0]).is_dir() and "retired-adapter" in str(arguments[0]):
            os.kill(os.getpid(), signal.SIGKILL)

    merge(tuned.path)
    before = hash_folder(tuned.adapter)
    child = os.fork()
    if child == 0:
        try:
            sys.addaudithook(die)
            finetune(tuning("training.max_steps=12"), tuned.path, resume=True)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert hash_folder(tuned.adapter) != before
    assert not tuned.merged.exists()


def test_a_world_of_one_process_is_a_run_like_any_other(run, tuning, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert finetune(tuning("training.max_steps=2"), run.path).adapter.is_dir()


def test_a_stop_before_the_first_checkpoint_leaves_one_curve(run, tuning):
    with pytest.raises(ZeroDivisionError):
        finetune(tuning(), run.path, callbacks=[Crash(step=1)])
    assert [line["step"] for line in read_metrics(run)] == [0]
    finetune(tuning(), run.path, resume=True)
    assert [line["step"] for line in read_metrics(run)] == [0, 1, 2, 3, 4, 5, 6]


def test_a_stop_after_a_checkpoint_leaves_one_curve(run, tuning):
    settings = tuning("training.save_steps=2", "training.eval_steps=6")
    with pytest.raises(ZeroDivisionError):
        finetune(settings, run.path, callbacks=[Crash(step=4)])
    assert [line["step"] for line in read_metrics(run)] == [0, 1, 2, 3]
    finetune(settings, run.path, resume=True)
    assert [line["step"] for line in read_metrics(run)] == [0, 1, 2, 3, 4, 5, 6]


def test_a_best_checkpoint_that_is_damaged_at_the_end_is_a_model_error(run, tuning):
    settings = tuning("training.eval_steps=2", "training.save_total_limit=9")
    with pytest.raises(ModelError, match="step-000004, with the lowest held-out loss, is damaged: adapter_model"):
        finetune(settings, run.path, callbacks=[Damage(run, step=4)])
    assert not run.adapter.exists()


@pytest.mark.parametrize(
    ("step", "said"), [(2, "; it is of phase 1, and what later phases trained is not in it)"), (6, "kept)")]
)
def test_a_kept_checkpoint_of_an_early_phase_is_named_with_it(run, tuning, caplog, step, said):
    caplog.set_level("INFO", "smolora.recipes.run_folder")
    phased = ("phases.strategy=both,mlp,attn", "training.eval_steps=2", "training.save_total_limit=9")
    finetune(tuning(*phased), run.path, callbacks=[Prefer(step)])
    [line] = [message for message in caplog.messages if message.startswith("held-out loss")]
    assert line.endswith(said)


def test_a_run_whose_best_checkpoint_was_damaged_ends_with_its_last_step(run, tuning, caplog):
    settings = tuning("training.eval_steps=2", "training.save_total_limit=9")
    with pytest.raises(ModelError):
        finetune(settings, run.path, callbacks=[Damage(run, step=4)])
    finetune(settings, run.path, resume=True)
    assert "of step 4, is lost" in caplog.text
    last = run.checkpoint_path(6) / "adapter_model.safetensors"
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == last.read_bytes()


def test_a_resume_without_a_whole_checkpoint_is_refused_and_changes_nothing(tuned, tuning):
    for checkpoint in tuned.checkpoints():
        flip_a_bit(checkpoint.path / "adapter_model.safetensors")
    before = snapshot(tuned.path)
    with pytest.raises(ModelError, match="no whole checkpoint to go on from: .*start a new run in another folder"):
        finetune(tuning(), tuned.path, resume=True)
    assert snapshot(tuned.path) == before


def test_a_resume_where_no_run_is_says_that_it_starts_one(run, tuning, caplog):
    caplog.set_level("INFO", logger="smolora")
    finetune(tuning(), run.path, resume=True)
    assert f"{run.path} holds no run: starting one" in caplog.messages
    assert "going on after step" not in caplog.text


def test_a_resume_before_the_first_checkpoint_says_that_it_starts_at_the_first_step(run, tuning, caplog):
    with pytest.raises(ZeroDivisionError):
        finetune(tuning(), run.path, callbacks=[Crash(1)])
    caplog.set_level("INFO", logger="smolora")
    finetune(tuning(), run.path, resume=True)
    assert f"{run.path} holds no checkpoint yet: starting at its first step" in caplog.messages


def test_a_damaged_checkpoint_is_named_once(tuned, tuning, caplog):
    flip_a_bit(tuned.checkpoint_path(6) / "adapter_model.safetensors")
    finetune(tuning(), tuned.path, resume=True)
    assert caplog.text.count("step-000006 is skipped") == 1


def test_a_resume_on_other_held_out_rows_is_refused(run, tuning, tmp_path):
    held_out = write_rows(tmp_path / "held_out.jsonl", ["seven", "eight"])
    settings = tuning(f"data.eval_source={held_out}")
    finetune(settings, run.path)
    before = (run.adapter / "adapter_model.safetensors").read_bytes()
    write_rows(held_out, ["seven", "nine"])
    with pytest.raises(DataError, match="written with other held-out"):
        finetune(settings, run.path, resume=True)
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == before


def test_a_resume_that_is_refused_for_its_rows_changes_nothing(tuned, tuning, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", NUMBERS)
    other.write_text(other.read_text() + '{"prompt": "half a row\n')
    before = snapshot(tuned.path)
    with pytest.raises(DataError, match="1 of 73 rows can't be used") as refused:
        finetune(tuning(f"data.sources={other}"), tuned.path, resume=True)
    assert snapshot(tuned.path) == before
    assert "All are listed in" not in str(refused.value)


@pytest.mark.parametrize(
    "fewer", [["training.max_steps=5"], ["training.max_steps=null", "training.num_train_epochs=0.5"]]
)
def test_a_resume_with_fewer_steps_than_were_done_is_refused_and_changes_nothing(tuned, tuning, fewer):
    before = snapshot(tuned.path)
    with pytest.raises(ConfigError, match="has done 6 steps, more than the 5 asked for"):
        finetune(tuning(*fewer), tuned.path, resume=True)
    assert snapshot(tuned.path) == before


def test_a_run_of_a_version_that_lacked_a_setting_resumes_where_it_is_at_its_default(tuned, tuning):
    stored = yaml.safe_load(tuned.resolved_config.read_text())
    del stored["speed"]["group_by_length"]
    tuned.resolved_config.write_text(yaml.safe_dump(stored))
    finetune(tuning(), tuned.path, resume=True)
    tuned.resolved_config.write_text(yaml.safe_dump(stored))
    with pytest.raises(ConfigError, match=r"speed\.group_by_length can't change within a run: it was False, now True"):
        finetune(tuning("speed.group_by_length=true"), tuned.path, resume=True)


def test_a_run_of_a_version_that_took_a_setting_in_vain_resumes(tuned, tuning):
    stored = yaml.safe_load(tuned.resolved_config.read_text())
    stored["evaluation"]["plateau_factor"] = 0.3
    tuned.resolved_config.write_text(yaml.safe_dump(stored))
    finetune(tuning(), tuned.path, resume=True)
    assert yaml.safe_load(tuned.resolved_config.read_text())["evaluation"]["plateau_factor"] == 0.5


def test_settings_at_their_default_are_no_part_of_what_a_checkpoint_depends_on(tuning):
    said = fingerprint_settings(tuning("adapter.r=2"))
    assert fingerprint_settings(tuning("adapter.r=2", "speed.group_by_length=false")) == said
    assert fingerprint_settings(tuning("adapter.r=2", "speed.group_by_length=true")) != said


def test_a_refused_resume_says_nothing_of_resuming_and_loads_no_model(tuned, tuning, caplog):
    caplog.clear()
    caplog.set_level("INFO", logger="smolora")
    for changes in (["training.max_steps=5"], ["training.learning_rate=1e-4", "training.seed=3"]):
        with pytest.raises(ConfigError):
            finetune(tuning(*changes), tuned.path, resume=True)
    assert caplog.text == ""


def test_pretraining_with_fewer_steps_than_were_done_is_refused_and_changes_nothing(run, pretraining):
    pretrain(pretraining, run.path)
    before = snapshot(run.path)
    fewer = pretraining.replace(training=pretraining.training.replace(max_steps=2))
    with pytest.raises(ConfigError, match="has done 3 steps, more than the 2 asked for"):
        pretrain(fewer, run.path, resume=True)
    assert snapshot(run.path) == before


def test_a_lost_configuration_lets_no_other_rank_through(tuned, tuning):
    tuned.resolved_config.unlink()
    with pytest.raises(ModelError, match="written with other settings"):
        finetune(tuning("adapter.r=4"), tuned.path, resume=True)


def test_a_lost_configuration_does_not_keep_the_run_from_going_on(tuned, tuning):
    tuned.resolved_config.unlink()
    finetune(tuning("training.max_steps=8"), tuned.path, resume=True)
    assert tuned.newest_checkpoint().step == 8


def test_a_new_run_among_the_checkpoints_of_an_old_one_is_refused_before_it_is_trained(tuned, tuning):
    tuned.resolved_config.unlink()
    before = snapshot(tuned.path)
    with pytest.raises(ConfigError, match="already holds"):
        finetune(tuning(), tuned.path)
    assert snapshot(tuned.path) == before


@pytest.mark.parametrize("content", ["nonsense: [", "", "- a list"])
def test_a_configuration_that_cannot_be_read_is_named(tuned, tuning, content):
    tuned.resolved_config.write_text(content)
    with pytest.raises(ModelError, match=r"resolved_config\.yaml can't be read"):
        finetune(tuning(), tuned.path, resume=True)


@pytest.mark.parametrize(("asked", "named"), [(50, True), (2, False), (0.9, False)])
def test_a_warm_up_that_the_run_has_no_room_for_is_named(pretraining, run, caplog, asked, named):
    pretrain(pretraining.replace(training=pretraining.training.replace(warmup_steps=asked)), run.path)
    assert (
        "training.warmup_steps=50 is more than the run has room for: warm-up takes 2 of its 3" in caplog.text
    ) == named
