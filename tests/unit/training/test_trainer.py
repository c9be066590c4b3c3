"""The loop: exact losses under accumulation, guards before the update, and what is written and kept."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from smolora.config import EvaluationConfig, TrainingConfig
from smolora.data.collate import collate_packed, collate_padded
from smolora.data.token_dataset import TokenDataset, build_example
from smolora.errors import BrokenRunError, ConfigError, DataError, StoppedBySignal
from smolora.records.gradient_log import GradientNormLog
from smolora.records.metrics_log import MetricsLog
from smolora.records.run_dir import RunDir
from smolora.records.staging import find_damage
from smolora.training.callback import Callback
from smolora.training.callbacks import EarlyStoppingCallback, PlateauRateCallback
from smolora.training.gradients import GradientNormCallback
from smolora.training.plan import StepPlan
from tests.unit.training.recorder import KillInEvaluation, Recorder, train, weights

NAN = float("nan")


class PoisonEvaluation(Callback):
    """From `step` on, the head gives NaN in eval mode alone, so that training itself stays finite."""

    def __init__(self, step):
        self.step = step

    def on_train_begin(self, trainer):
        def poison(head, inputs, output):
            return output if head.training or trainer.state.step < self.step else output * NAN

        trainer.bundle.model.lm_head.register_forward_hook(poison)


class PoisonGradient(Callback):
    """Plants one number in the gradient of ln_final.bias."""

    def __init__(self, value):
        self.value = value

    def on_gradients(self, trainer):
        trainer.parameters["ln_final.bias"].grad[0] = self.value


class Kill(Callback):
    """Sends SIGTERM at one event of one step."""

    def __init__(self, event, step):
        self.event, self.step = event, step

    def on_step_begin(self, trainer):
        self._send("on_step_begin", trainer.state.step + 1)

    def on_log(self, trainer, record):
        self._send("on_log", trainer.state.step)

    def on_evaluate(self, trainer, eval_loss):
        self._send("on_evaluate", trainer.state.step)

    def on_save(self, trainer):
        self._send("on_save", trainer.state.step)

    def _send(self, event, step):
        if (event, step) == (self.event, self.step):
            os.kill(os.getpid(), signal.SIGTERM)


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


@pytest.mark.parametrize(("max_grad_norm", "expected"), [(1e-3, 1e-3), (1e3, None), (0.0, None)])
def test_an_update_takes_the_gradient_at_its_norm_or_at_the_largest_allowed(make_trainer, run, max_grad_norm, expected):
    _, recorder = train(make_trainer, run_dir=run, max_steps=1, max_grad_norm=max_grad_norm)
    moments = load_file(run.checkpoint_path(1) / "optim.safetensors")
    # AdamW's first moment starts at 0 and takes a tenth of the gradient.
    norm = torch.stack([10 * m.norm() for name, m in moments.items() if name.endswith(".exp_avg")]).norm()
    assert norm.item() == pytest.approx(expected or recorder.records[0].grad_norm, rel=1e-3)


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


def test_a_signal_finishes_the_step_saves_and_stops(make_trainer, run):
    with pytest.raises(StoppedBySignal, match="SIGTERM after step 3"):
        make_trainer(run_dir=run, callbacks=[Kill("on_step_begin", 3)], save_steps=100).train()
    assert run.newest_checkpoint().step == 3
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_is_answered_at_once_by_what_the_run_does_now(make_trainer, run, capfd):
    with pytest.raises(StoppedBySignal):
        make_trainer(run_dir=run, callbacks=[Kill("on_step_begin", 3)]).train()
    assert "SIGTERM: finishing this step and saving; another Ctrl-C stops at once" in capfd.readouterr().err


# A step that saves nothing is the harder case: step 3 has no evaluation that could improve.
@pytest.mark.parametrize(("event", "step", "last"), [("on_evaluate", 2, 2), ("on_log", 3, 4), ("on_save", 2, 3)])
def test_a_signal_after_the_update_stops_a_step_whose_checkpoint_is_on_disk(
    make_trainer, run, dataset, event, step, last
):
    settings = {"logging_steps": 1, "eval_steps": 2, "save_steps": 2 if event == "on_save" else 100}
    with pytest.raises(StoppedBySignal, match=rf"SIGTERM after step {last}.*is safe in"):
        make_trainer(run_dir=run, eval_dataset=dataset, callbacks=[Kill(event, step)], **settings).train()
    assert find_damage(run.checkpoint_path(last)) is None


# Every evaluation counts as none better, so that the one of step 2 lowers the rate and the one of step 4 ends the run.
@pytest.mark.parametrize("step", [2, 4])
def test_a_signal_cuts_an_evaluation_short_and_the_resumed_run_makes_it(make_trainer, dataset, tmp_path, step):
    def train(name, *callbacks, resume=False):
        run = RunDir(tmp_path / name)
        run.path.mkdir(exist_ok=True)
        more = [EarlyStoppingCallback(2, 9.0), PlateauRateCallback(1), GradientNormCallback(GradientNormLog(run.path))]
        settings = {"eval_steps": 2, "save_steps": 100, "logging_steps": 1}
        trainer = make_trainer(run_dir=run, eval_dataset=dataset, callbacks=[*more, *callbacks], **settings)
        trainer.evaluation = EvaluationConfig(batch_size=2)
        state = trainer.train(resume=resume)
        curve = [{**line, "tokens_per_second": None} for line in MetricsLog(run.metrics).read()]
        gradients = [file.read_bytes() for file in (run.group_norms, run.layer_norms, run.gradient_summary)]
        return state, curve, gradients, weights(trainer)

    kill = KillInEvaluation(step)
    with pytest.raises(StoppedBySignal, match=rf"SIGTERM after step {step}.*is safe in"):
        train("run", kill)
    assert kill.passes == 2
    with pytest.raises(StoppedBySignal, match=rf"SIGTERM after step {step}.*is safe in"):
        train("run", KillInEvaluation(step), resume=True)
    state, curve, gradients, found = train("run", resume=True)
    whole_state, whole_curve, whole_gradients, expected = train("whole")
    assert (state, curve, gradients) == (whole_state, whole_curve, whole_gradients)
    assert_close(found, expected, rtol=0, atol=0)
    assert state.step == 4


def test_an_evaluation_made_on_resume_is_saved_before_the_next_step(make_trainer, run, dataset):
    settings = {"run_dir": run, "eval_dataset": dataset, "eval_steps": 2, "save_steps": 100}
    with pytest.raises(StoppedBySignal):
        make_trainer(callbacks=[KillInEvaluation(2)], **settings).train()
    recorder = Recorder()
    for _ in range(2):
        with pytest.raises(BrokenRunError):
            make_trainer(callbacks=[recorder, PoisonGradient(NAN)], **settings).train(resume=True)
    assert recorder.events.count("evaluate") == 1
    lines = MetricsLog(run.metrics).read()
    assert [(line["step"], "eval_loss" in line) for line in lines] == [(0, True), (1, False), (2, True)]


def test_the_last_evaluation_made_on_resume_leaves_the_checkpoints_of_a_run_that_was_never_stopped(
    make_trainer, run, dataset
):
    settings = {"run_dir": run, "eval_dataset": dataset, "eval_steps": 3, "save_total_limit": 1}
    with pytest.raises(StoppedBySignal):
        make_trainer(callbacks=[KillInEvaluation(6)], **settings).train()
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [3, 6]
    for evaluations in (1, 0):
        trainer, recorder = train(make_trainer, resume=True, **settings)
        assert recorder.events.count("evaluate") == evaluations
        assert trainer.state.best_step == 6
        assert [(one.step, find_damage(one.path)) for one in run.checkpoints()] == [(6, None)]


def test_a_signal_in_the_evaluation_before_the_first_step_ends_the_run_at_once(make_trainer, run, dataset):
    kill = KillInEvaluation(0)
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
        make_trainer(run_dir=run, eval_dataset=dataset, callbacks=[kill]).train()
    assert (kill.passes, run.checkpoints()) == (2, [])
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_in_the_last_evaluation_of_a_run_without_a_folder_stops_it(make_trainer, dataset):
    with pytest.raises(StoppedBySignal, match="after step 6. Nothing was saved"):
        make_trainer(eval_dataset=dataset, callbacks=[KillInEvaluation(6)]).train()


def test_a_signal_in_the_last_step_stops_a_run_that_has_nothing_left_to_learn(make_trainer, run):
    with pytest.raises(StoppedBySignal, match=r"SIGTERM after step 6.*is safe in"):
        make_trainer(run_dir=run, callbacks=[Kill("on_step_begin", 6)]).train()
    before = MetricsLog(run.metrics).read()
    assert make_trainer(run_dir=run).train(resume=True).step == 6
    assert MetricsLog(run.metrics).read() == before


def test_a_signal_when_all_steps_are_done_stops_too(make_trainer, run):
    class KillAtTheEnd(Callback):
        def on_finish(self, trainer):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedBySignal, match=r"SIGTERM after step 6.*is safe in"):
        make_trainer(run_dir=run, callbacks=[KillAtTheEnd()]).train()


def test_a_signal_in_the_last_step_of_a_run_without_a_folder_stops_nothing(make_trainer):
    assert make_trainer(callbacks=[Kill("on_step_begin", 6)]).train().step == 6


def test_a_signal_without_a_run_folder_says_that_nothing_was_saved(make_trainer):
    with pytest.raises(StoppedBySignal, match="Nothing was saved"):
        make_trainer(callbacks=[Kill("on_step_begin", 2)]).train()


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


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_a_gradient_that_is_not_finite_is_named_before_the_update(make_trainer, value, max_grad_norm):
    trainer = make_trainer(callbacks=[PoisonGradient(value)], max_grad_norm=max_grad_norm)
    before = weights(trainer)
    with pytest.raises(BrokenRunError, match=r"not finite first in the gradient of ln_final\.bias\. The update"):
        trainer.train()
    assert_close(weights(trainer), before, rtol=0, atol=0)


def test_one_bad_gradient_leaves_the_others_finite(make_trainer):
    trainer = make_trainer(callbacks=[PoisonGradient(NAN)], max_grad_norm=1e-3)
    with pytest.raises(BrokenRunError):
        trainer.train()
    broken = [name for name, p in trainer.parameters.items() if not torch.isfinite(p.grad).all()]
    assert broken == ["ln_final.bias"]


def test_a_module_that_fails_in_the_second_micro_batch_alone_is_named(make_trainer, dataset):
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    first, second = (len(dataset[int(rows[0])]) for rows in StepPlan(12, TrainingConfig(**settings)).micro_batches(0))
    assert first != second, "the lengths tell the micro-batches apart"
    trainer = make_trainer(**settings)
    trainer.bundle.model.blocks[1].ln2.register_forward_hook(
        lambda _module, _inputs, output: output * NAN if output.shape[1] == second else output
    )
    with pytest.raises(BrokenRunError, match=r"step 1: .*not finite first in the output of blocks\.1\.ln2\."):
        trainer.train()


def test_a_parameter_that_is_not_finite_is_named(make_trainer):
    trainer = make_trainer()
    with torch.no_grad():
        trainer.parameters["blocks.0.ln1.weight"][3] = float("inf")
    with pytest.raises(BrokenRunError, match=r"not finite first in parameter blocks\.0\.ln1\.weight\."):
        trainer.train()


@pytest.mark.parametrize("step", [0, 4])
def test_a_held_out_loss_that_is_not_finite_is_a_broken_run(make_trainer, run, dataset, step):
    trainer = make_trainer(eval_dataset=dataset, run_dir=run, eval_steps=2, callbacks=[PoisonEvaluation(step)])
    with pytest.raises(BrokenRunError, match=f"step {step}: the held-out loss is nan"):
        trainer.train()
    assert trainer.state.step == step
    assert not run.checkpoint_path(step).exists()


def test_a_held_out_loss_of_zero_is_a_loss_like_any_other(make_trainer, run):
    rows = TokenDataset([build_example([41] * 6, [(2, 6)])] * 4)

    def be_certain(head, _inputs, output):
        if head.training:
            return output
        certain = torch.zeros_like(output)
        certain[..., 41] = 1e4
        return certain

    trainer = make_trainer(rows=rows, eval_dataset=rows, run_dir=run, eval_steps=2)
    trainer.bundle.model.lm_head.register_forward_hook(be_certain)
    state = trainer.train()
    assert (state.base_eval_loss, state.best_eval_loss, state.best_step) == (0.0, 0.0, 2)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["eval_loss"] for line in lines if "eval_loss" in line] == [0.0] * 4


@pytest.mark.parametrize("is_training", [True, False])
def test_the_mode_of_the_model_is_put_back(make_trainer, is_training):
    trainer = make_trainer()
    trainer.bundle.model.train(is_training)
    trainer.train()
    assert trainer.bundle.model.training == is_training


def test_an_evaluation_leaves_every_module_in_its_own_mode(make_trainer, dataset):
    trainer = make_trainer(eval_dataset=dataset)
    modules = list(trainer.bundle.model.modules())
    trainer.bundle.model.train()
    modules[-1].eval()
    trainer.evaluate()
    assert [module.training for module in modules] == [True] * (len(modules) - 1) + [False]


def test_the_mode_of_the_model_is_put_back_after_a_broken_run(make_trainer):
    trainer = make_trainer(callbacks=[PoisonGradient(NAN)])
    trainer.bundle.model.eval()
    with pytest.raises(BrokenRunError):
        trainer.train()
    assert not trainer.bundle.model.training


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


def test_evaluation_makes_its_batches_one_by_one(make_trainer, dataset):
    made, waiting = [], []

    def collate(examples):
        made.append(len(examples))
        return collate_packed(examples)

    trainer = make_trainer(eval_dataset=dataset, collate=collate)
    trainer.evaluation = EvaluationConfig(batch_size=2)
    trainer.bundle.model.register_forward_hook(lambda *_: waiting.append(len(made) - len(waiting)))
    trainer.evaluate()
    assert len(waiting) > 2
    assert set(waiting) == {1}


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
