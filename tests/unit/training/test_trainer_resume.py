"""A resume changes no bit, and is refused where it could not."""

from __future__ import annotations

import json
import shutil

import pytest
from torch.testing import assert_close

from smolora.errors import ConfigError, DataError, ModelError
from smolora.records.run_dir import RunDir
from smolora.training.callback import Callback
from smolora.training.callbacks import EarlyStoppingCallback
from smolora.training.checkpoint import RunIdentity
from tests.unit.training.recorder import Recorder, train, weights


class Counter(Callback):
    """Counts the updates of this run, and keeps the number through a resume."""

    def __init__(self):
        self.updates = 0

    def on_step_end(self, trainer, record):
        self.updates += 1

    def state_dict(self):
        return {"updates": self.updates}

    def load_state_dict(self, state):
        self.updates = int(state["updates"])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("step", range(1, 6))
def test_a_resume_at_any_step_is_bit_equal_to_never_stopping(make_trainer, run, tmp_path, step):
    class Stop(Exception):
        pass

    class Crash(Callback):
        def on_step_begin(self, trainer):
            if trainer.state.step == step:
                raise Stop

    settings = {"dropout": 0.2, "max_steps": 6, "per_device_train_batch_size": 5}  # Three steps are one epoch.
    whole = RunDir(tmp_path / "whole")
    whole.path.mkdir()
    expected, _ = train(make_trainer, run_dir=whole, **settings)
    with pytest.raises(Stop):
        make_trainer(run_dir=run, callbacks=[Crash()], **settings).train()
    resumed, _ = train(make_trainer, run_dir=run, resume=True, **settings)
    assert_close(weights(resumed), weights(expected), rtol=0, atol=0)
    assert losses_on_disk(run) == losses_on_disk(whole)


def losses_on_disk(run):
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [(line["step"], line.get("loss"), line.get("grad_norm")) for line in lines]


@pytest.mark.parametrize("file", ["model.safetensors", "optim.safetensors", "state.json", "MANIFEST.json"])
@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_a_damaged_checkpoint_is_named_and_the_older_one_gives_the_same_end(make_trainer, run, caplog, file, damage):
    expected, _ = train(make_trainer, run_dir=run)
    broken = run.checkpoint_path(6) / file
    broken.unlink() if damage == "missing" else flip_a_bit(broken)
    resumed, recorder = train(make_trainer, run_dir=run, resume=True)
    assert len(recorder.records) == 1
    assert "step-000006 is skipped" in caplog.text
    assert_close(weights(resumed), weights(expected), rtol=0, atol=0)


def test_a_checkpoint_that_a_kill_kept_from_being_pruned_is_pruned_at_resume(make_trainer, run, tmp_path):
    class Keep(Callback):
        def on_save(self, trainer):
            if trainer.state.step == 4:
                shutil.copytree(run.checkpoint_path(4), tmp_path / "kept")

    make_trainer(run_dir=run, callbacks=[Keep()]).train()
    (tmp_path / "kept").rename(run.checkpoint_path(4))
    train(make_trainer, run_dir=run, resume=True)
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [5, 6]


def test_resume_without_a_checkpoint_starts_afresh(make_trainer, run):
    _, recorder = train(make_trainer, run_dir=run, resume=True)
    assert len(recorder.records) == 6


@pytest.mark.parametrize(
    ("field", "error"),
    [
        ("base", ModelError),
        ("tokenizer", ModelError),
        ("data", DataError),
        ("held_out", DataError),
        ("settings", ModelError),
    ],
)
def test_a_checkpoint_of_another_identity_is_refused(make_trainer, run, field, error):
    train(make_trainer, run_dir=run)
    trainer = make_trainer(run_dir=run)
    trainer._identity = RunIdentity(**{**vars(trainer._identity), field: "other"})
    with pytest.raises(error, match=f"other {field.replace('_', '-')}"):
        trainer.train(resume=True)


def test_a_refused_checkpoint_leaves_the_mode_of_the_model(make_trainer, run):
    train(make_trainer, run_dir=run)
    trainer = make_trainer(run_dir=run, max_steps=5)
    trainer.bundle.model.eval()
    with pytest.raises(ConfigError):
        trainer.train(resume=True)
    assert not trainer.bundle.model.training


def test_fewer_steps_than_were_done_are_refused(make_trainer, run):
    train(make_trainer, run_dir=run)
    with pytest.raises(ConfigError, match="has done 6 steps, more than the 5 asked for"):
        make_trainer(run_dir=run, max_steps=5).train(resume=True)


def test_a_run_that_is_finished_says_so_in_one_line_when_it_is_resumed(make_trainer, run, caplog):
    caplog.set_level("INFO", logger="smolora")
    train(make_trainer, run_dir=run)
    assert "finished already" not in caplog.text
    train(make_trainer, run_dir=run, resume=True)
    assert [text for text in caplog.messages if "finished" in text] == ["the run is finished already, at step 6 of 6"]


def test_more_steps_than_before_are_trained_and_the_run_says_where_it_goes_on(make_trainer, run, caplog):
    caplog.set_level("INFO", logger="smolora")
    train(make_trainer, run_dir=run)
    assert "going on" not in caplog.text
    _, recorder = train(make_trainer, run_dir=run, max_steps=8, resume=True)
    assert [record.step for record in recorder.records] == [7, 8]
    assert "going on after step 6 of 8" in caplog.messages


@pytest.fixture
def stopped_early(make_trainer, run, dataset):
    """Settings of a run of 8 steps that patience 1 ended after its second evaluation, at step 2."""
    settings = {"eval_dataset": dataset, "run_dir": run, "eval_steps": 1, "max_steps": 8}
    stopping = EarlyStoppingCallback(patience=2, threshold=100.0)
    assert make_trainer(callbacks=[stopping], **settings).train().step == 2
    return settings


def test_a_run_that_was_stopped_early_is_not_trained_further_with_the_same_patience(make_trainer, stopped_early):
    recorder = Recorder()
    trainer = make_trainer(callbacks=[EarlyStoppingCallback(patience=2, threshold=100.0), recorder], **stopped_early)
    state = trainer.train(resume=True)
    assert (state.step, recorder.records) == (2, [])
    assert state.stop_reason == "the held-out loss has not improved for 2 evaluations"


def test_a_run_that_was_stopped_early_goes_on_without_early_stopping(make_trainer, stopped_early):
    trainer, recorder = train(make_trainer, resume=True, **stopped_early)
    assert [record.step for record in recorder.records] == [3, 4, 5, 6, 7, 8]
    assert trainer.state.stop_reason is None


def test_a_run_that_was_stopped_early_goes_on_with_more_patience(make_trainer, stopped_early):
    stopping = EarlyStoppingCallback(patience=3, threshold=100.0)
    assert make_trainer(callbacks=[stopping], **stopped_early).train(resume=True).step == 3


def test_two_callbacks_of_one_class_each_get_their_own_state_back(make_trainer, run, dataset):
    settings = {"eval_dataset": dataset, "run_dir": run, "eval_steps": 1, "max_steps": 3}
    patient, strict = EarlyStoppingCallback(patience=9), EarlyStoppingCallback(patience=9, threshold=100.0)
    make_trainer(callbacks=[patient, strict], **settings).train()
    restored = [EarlyStoppingCallback(patience=9), EarlyStoppingCallback(patience=9)]
    make_trainer(callbacks=restored, **settings).train(resume=True)
    assert [callback.state_dict() for callback in restored] == [patient.state_dict(), strict.state_dict()]
    assert restored[0].state_dict() != restored[1].state_dict()


def test_a_callback_goes_on_with_what_it_knew_at_the_checkpoint(make_trainer, run):
    make_trainer(run_dir=run, callbacks=[Counter()], max_steps=4).train()
    counter = Counter()
    make_trainer(run_dir=run, callbacks=[counter], max_steps=6).train(resume=True)
    assert counter.updates == 6


def test_a_damaged_best_checkpoint_is_named_and_dropped(make_trainer, run, dataset, caplog):
    settings = {"eval_dataset": dataset, "run_dir": run, "eval_steps": 3}
    trainer, _ = train(make_trainer, save_total_limit=9, max_steps=5, **settings)
    assert trainer.state.best_step == 5
    trainer.state.best_step = 3
    trainer.state.step = 7  # A checkpoint whose best one is an older folder.
    trainer._save()
    flip_a_bit(run.checkpoint_path(3) / "model.safetensors")
    resumed = make_trainer(max_steps=7, **settings)
    state = resumed.train(resume=True)
    assert "the checkpoint with the lowest held-out loss, of step 3, is lost: model.safetensors" in caplog.text
    assert (state.best_step, state.best_eval_loss) == (None, None)
