"""The loop: exact losses under accumulation, guards before the update, and a resume that changes no bit."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from torch.testing import assert_close

from smolora.config import EvaluationConfig
from smolora.data.collate import collate_padded
from smolora.data.token_dataset import TokenDataset, build_example
from smolora.errors import BrokenRunError, ConfigError, DataError, ModelError, StoppedBySignal
from smolora.records.run_dir import RunDir
from smolora.training.callback import Callback
from smolora.training.callbacks import EarlyStoppingCallback, ProfileCallback
from smolora.training.checkpoint import RunIdentity


class Recorder(Callback):
    """Keeps the records of all steps, and the gradients of the last one."""

    def __init__(self):
        self.records, self.gradients, self.events = [], {}, []

    def on_gradients(self, trainer):
        self.gradients = {name: p.grad.clone() for name, p in trainer.parameters.items()}
        self.events.append("gradients")

    def on_step_end(self, trainer, record):
        self.records.append(record)
        self.events.append("step_end")

    @property
    def losses(self):
        return [record.loss for record in self.records]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.bundle.model.named_parameters()}


def train(make_trainer, *, resume=False, **settings):
    recorder = Recorder()
    trainer = make_trainer(callbacks=[recorder], **settings)
    trainer.train(resume=resume)
    return trainer, recorder


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    return run


@pytest.mark.parametrize(("size", "passes"), [(1, 4), (2, 2)])
def test_accumulated_micro_batches_equal_one_big_batch(make_trainer, size, passes):
    big, expected = train(make_trainer)
    small, found = train(make_trainer, per_device_train_batch_size=size, gradient_accumulation_steps=passes)
    # The sums are the same numbers in another order: float32 rounding, carried through six updates.
    assert_close(found.losses, expected.losses, rtol=1e-5, atol=1e-5)
    assert_close(weights(small), weights(big), rtol=1e-4, atol=1e-4)


def test_a_partial_last_group_is_weighted_by_its_own_tokens(make_trainer):
    _, expected = train(make_trainer, max_steps=None, per_device_train_batch_size=5)
    _, found = train(make_trainer, max_steps=None, per_device_train_batch_size=1, gradient_accumulation_steps=5)
    assert [record.tokens for record in found.records] == [record.tokens for record in expected.records]
    assert_close(found.losses, expected.losses, rtol=1e-5, atol=1e-5)


def test_packed_and_padded_batches_give_the_same_loss(make_trainer):
    # A GPTModel reads no padding mask, but a causal model with padding on the right never looks at it.
    _, packed = train(make_trainer)
    _, padded = train(make_trainer, collate=collate_padded)
    assert_close(padded.losses, packed.losses, rtol=1e-5, atol=1e-5)


def test_gradients_are_offered_before_clipping(make_trainer):
    _, recorder = train(make_trainer, max_steps=1, max_grad_norm=1e-3)
    norm = torch.stack([gradient.norm() for gradient in recorder.gradients.values()]).norm()
    assert norm > 1e-3
    assert recorder.records[0].grad_norm == pytest.approx(norm.item(), rel=1e-5)
    assert recorder.events == ["gradients", "step_end"]


def test_gradient_checkpointing_changes_no_loss(make_trainer):
    _, expected = train(make_trainer, dropout=0.1)
    trainer, found = train(make_trainer, dropout=0.1, gradient_checkpointing=True)
    assert found.losses == expected.losses
    assert not trainer.bundle.model.gradient_checkpointing


def test_the_same_seed_gives_the_same_bits(make_trainer):
    first, second = (weights(train(make_trainer, dropout=0.2)[0]) for _ in range(2))
    assert_close(first, second, rtol=0, atol=0)


def test_a_drawing_callback_does_not_change_the_noise(make_trainer):
    class Drawer(Callback):
        def on_step_begin(self, trainer):
            torch.rand(7)

    plain = make_trainer(dropout=0.2)
    drawn = make_trainer(dropout=0.2, callbacks=[Drawer()])
    plain.train()
    drawn.train()
    assert_close(weights(drawn), weights(plain), rtol=0, atol=0)


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
    content = bytearray(broken.read_bytes())
    content[len(content) // 2] ^= 1
    broken.unlink() if damage == "missing" else broken.write_bytes(content)
    resumed, recorder = train(make_trainer, run_dir=run, resume=True)
    assert len(recorder.records) == 1
    assert "step-000006 is skipped" in caplog.text
    assert_close(weights(resumed), weights(expected), rtol=0, atol=0)


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


def test_a_signal_finishes_the_step_saves_and_stops(make_trainer, run):
    class Interrupt(Callback):
        def on_step_begin(self, trainer):
            if trainer.state.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedBySignal, match="SIGTERM after step 3"):
        make_trainer(run_dir=run, callbacks=[Interrupt()], save_steps=100).train()
    assert run.newest_checkpoint().step == 3
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_number_that_is_not_finite_stops_before_the_update_and_names_the_module(make_trainer):
    class Poison(Callback):
        def on_step_begin(self, trainer):
            if trainer.state.step == 2:
                handle = trainer.bundle.model.blocks[1].ln2.register_forward_hook(lambda *args: args[2] * float("nan"))
                self.before, self.handle = weights(trainer), handle

    poison = Poison()
    trainer = make_trainer(callbacks=[poison])
    with pytest.raises(BrokenRunError, match=r"step 3: .*the output of blocks\.1\.ln2"):
        trainer.train()
    assert_close(weights(trainer), poison.before, rtol=0, atol=0)


def test_a_gradient_that_is_not_finite_stops_before_the_update(make_trainer):
    class Poison(Callback):
        def on_gradients(self, trainer):
            trainer.parameters["ln_final.bias"].grad[0] = float("inf")

    with pytest.raises(BrokenRunError, match=r"the gradient of ln_final\.bias"):
        make_trainer(callbacks=[Poison()]).train()


def test_a_learning_rate_of_zero_is_a_broken_run(make_trainer):
    with pytest.raises(BrokenRunError, match="did not move in 6 updates"):
        make_trainer(learning_rate=0.0).train()


def test_a_trainable_tensor_without_gradient_is_a_broken_run(make_trainer):
    trainer = make_trainer()
    trainer.parameters["unused"] = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(BrokenRunError, match="1 of .* received no gradient, first unused"):
        trainer.train()


def test_a_model_with_nothing_to_train_is_refused(make_trainer, dataset):
    bundle = make_trainer().bundle
    bundle.model.requires_grad_(False)
    with pytest.raises(ConfigError, match="no tensor of the model requires gradients"):
        type(make_trainer())(bundle, dataset, make_trainer().config, collate=collate_padded)


def test_frozen_tensors_do_not_move(make_trainer, dataset):
    template = make_trainer()
    frozen = template.bundle.model.blocks[0]
    frozen.requires_grad_(False)
    before = {name: p.clone() for name, p in frozen.named_parameters()}
    trainer = type(template)(
        template.bundle, dataset, template.config.replace(weight_decay=0.1), collate=collate_padded
    )
    trainer.train()
    assert_close(dict(frozen.named_parameters()), before, rtol=0, atol=0, check_stride=False)


def test_a_batch_without_a_target_is_an_error(make_trainer):
    rows = TokenDataset([build_example([41, 42, 43], [])])
    with pytest.raises(DataError, match="has a target"):
        make_trainer(rows=rows).train()


def test_evaluation_is_the_token_mean_and_leaves_the_mode(make_trainer, dataset):
    trainer = make_trainer(eval_dataset=dataset, dropout=0.5)
    trainer.bundle.model.train()
    whole = trainer.evaluate()
    trainer.evaluation = EvaluationConfig(batch_size=5)
    assert trainer.evaluate() == pytest.approx(whole, rel=1e-6)
    assert trainer.bundle.model.training


def test_the_checkpoint_with_the_lowest_evaluation_loss_is_kept(make_trainer, run, dataset):
    class Spoil(Callback):
        """Makes the model worse and worse from step 2 on."""

        def on_step_end(self, trainer, record):
            if record.step > 2:
                with torch.no_grad():
                    trainer.bundle.model.token_embedding.weight.mul_(30)

    trainer = make_trainer(eval_dataset=dataset, run_dir=run, callbacks=[Spoil()], eval_steps=1, save_total_limit=1)
    state = trainer.train()
    assert state.best_step == 2
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [2, 6]


def test_early_stopping_counts_evaluations_and_survives_a_resume(make_trainer, run, dataset):
    settings = {"eval_dataset": dataset, "run_dir": run, "eval_steps": 2, "learning_rate": 1e-5}
    # With such a rate no evaluation improves by the threshold on the first one, before any update.
    first = make_trainer(callbacks=[EarlyStoppingCallback(patience=2, threshold=0.1)], **settings)
    first.config = first.config.replace(max_steps=3)
    first.state.total_steps = 3
    first.train()
    stopping = EarlyStoppingCallback(patience=2, threshold=0.1)
    state = make_trainer(callbacks=[stopping], **settings).train(resume=True)
    assert state.step < 6
    assert "has not improved for 2 evaluations" in state.stop_reason


def test_metrics_are_one_object_per_logged_step(make_trainer, run, dataset):
    train(make_trainer, run_dir=run, eval_dataset=dataset, logging_steps=3, eval_steps=6)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 3, 6]
    assert lines[0].keys() == {"step", "eval_loss"}
    assert {
        "step",
        "loss",
        "grad_norm",
        "learning_rate",
        "tokens",
        "input_tokens",
        "tokens_per_second",
        "phase",
    } <= set(lines[1])
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"]


def test_a_profile_of_the_asked_steps_is_written(make_trainer, run):
    train_with = ProfileCallback((2, 3), run.profile)
    make_trainer(callbacks=[train_with]).train()
    assert "traceEvents" in json.loads(run.profile.read_text())
