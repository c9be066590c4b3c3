"""What listens to a run: early stopping, a profile of some steps, and the lines that people read."""

from __future__ import annotations

import io
import json
import math
import re
import time

import pytest
from rich.console import Console

from smolora.config.phases import DynamicLoRAConfig
from smolora.data.token_dataset import TokenDataset
from smolora.training.callback import Callback
from smolora.training.callbacks import (
    EarlyStoppingCallback,
    EvaluationTimeCallback,
    PlateauRateCallback,
    ProfileCallback,
    ProgressCallback,
)
from smolora.training.gradients import GradientNormCallback
from smolora.training.phases import DynamicLoRACallback
from smolora.training.state import StepRecord


def evaluate(trainer, callback, losses):
    """Tell the losses to the callback one by one, and return how many it takes to stop the run."""
    for count, loss in enumerate(losses, start=1):
        callback.on_evaluate(trainer, loss)
        if trainer.state.should_stop:
            return count
    return None


@pytest.mark.parametrize(
    ("patience", "threshold", "losses", "stops_at"),
    [
        pytest.param(1, 0.0, [3.0, 2.0, 1.0], None, id="each improves"),
        pytest.param(1, 0.0, [3.0, 3.0], 2, id="an equal loss is no improvement"),
        pytest.param(2, 0.0, [3.0, 4.0, 2.0, 4.0, 4.0], 5, id="an improvement starts the count anew"),
        pytest.param(3, 0.0, [3.0, 4.0, 3.5, 3.2], 4, id="the best so far counts, not the one before"),
        pytest.param(2, 0.5, [3.0, 2.6, 2.5], 3, id="less than the threshold is no improvement"),
        pytest.param(2, 0.5, [3.0, 2.6, 2.4], None, id="small steps add up to the threshold"),
        pytest.param(1, 0.0, [3.0, math.nan], 2, id="NaN never improves"),
        pytest.param(1, 0.0, [math.inf], 1, id="an infinite loss never improves"),
    ],
)
def test_early_stopping_counts_evaluations_without_improvement(make_trainer, patience, threshold, losses, stops_at):
    assert evaluate(make_trainer(), EarlyStoppingCallback(patience, threshold), losses) == stops_at


def test_early_stopping_says_why(make_trainer):
    trainer = make_trainer()
    evaluate(trainer, EarlyStoppingCallback(patience=2), [1.0, 2.0, 2.0])
    assert trainer.state.stop_reason == "the held-out loss has not improved for 2 evaluations"


@pytest.mark.parametrize("losses", [[], [3.0, 4.0], [math.nan]])
def test_the_state_of_early_stopping_is_json_and_comes_back(make_trainer, losses):
    first, second = EarlyStoppingCallback(patience=5), EarlyStoppingCallback(patience=5)
    evaluate(make_trainer(), first, losses)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert vars(second) == vars(first)
    assert first.state_dict().keys() == {"best", "evaluations_without_improvement"}, "as checkpoints have it"


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


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: EarlyStoppingCallback(patience=3), id="early stopping"),
        pytest.param(lambda: PlateauRateCallback(patience=1), id="plateau"),
        pytest.param(GradientNormCallback, id="gradient norms"),
        pytest.param(lambda: DynamicLoRACallback(DynamicLoRAConfig(strategy="both,mlp,attn")), id="phases"),
    ],
)
def test_a_callback_that_is_used_again_starts_afresh(make_trainer, dataset, make):
    settings = {"eval_dataset": dataset, "eval_steps": 1}
    used, fresh = make(), make()
    make_trainer(callbacks=[used], **settings, learning_rate=10.0).train()
    spoiled = used.state_dict()
    for callback in (used, fresh):
        make_trainer(callbacks=[callback], **settings).train()
    assert used.state_dict() == fresh.state_dict() != spoiled


def test_a_plateau_at_the_last_update_lowers_no_rate_that_is_spoken_of(make_trainer, dataset, caplog):
    caplog.set_level("INFO", "smolora.training.callbacks")
    settings = {"eval_dataset": dataset, "eval_steps": 2, "max_steps": 4, "learning_rate": 10.0}
    make_trainer(callbacks=[PlateauRateCallback(patience=1)], **settings).train()
    [line] = caplog.messages
    assert re.fullmatch(r"step 2: no held-out loss below \d\.\d{4} in 1 evaluation; the rate is now 0\.5 of .*", line)


def profiled_steps(path):
    """Return how often the optimiser stepped while the profile ran."""
    names = [event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]]
    return sum(name.startswith("Optimizer.step#") for name in names)


@pytest.mark.parametrize(("steps", "expected"), [((2, 3), 2), ((1, 1), 1), ((5, 99), 2)])
def test_a_profile_covers_the_asked_steps(make_trainer, run, steps, expected):
    make_trainer(callbacks=[ProfileCallback(steps, run.profile)]).train()
    assert profiled_steps(run.profile) == expected


def test_a_profile_of_a_run_resumed_past_its_first_step_covers_the_rest(make_trainer, run):
    make_trainer(run_dir=run, max_steps=3).train()
    make_trainer(run_dir=run, callbacks=[ProfileCallback((2, 5), run.profile)]).train(resume=True)
    assert profiled_steps(run.profile) == 2


def test_a_run_resumed_past_the_profile_writes_none(make_trainer, run):
    make_trainer(run_dir=run, max_steps=4).train()
    make_trainer(run_dir=run, callbacks=[ProfileCallback((2, 3), run.profile)]).train(resume=True)
    assert not run.profile.exists()


def test_a_run_that_fails_writes_the_profile_of_what_it_did(make_trainer, run):
    class Crash(Callback):
        def on_step_end(self, trainer, record):
            if record.step == 2:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make_trainer(callbacks=[ProfileCallback((1, 5), run.profile), Crash()]).train()
    assert profiled_steps(run.profile) == 2


def progress(make_trainer, *, is_terminal, **settings):
    """Return what a run prints."""
    text = io.StringIO()
    console = Console(file=text, force_terminal=is_terminal, width=120)
    make_trainer(callbacks=[ProgressCallback(console)], **settings).train()
    return text.getvalue()


FACTS = r"loss \d\.\d{3}(  held-out \d\.\d{3})?  [\d,]+ tokens/s  ETA \d+:\d\d  lr \d\.\de-\d\d"


def test_elsewhere_than_on_a_terminal_each_logged_step_is_a_plain_line(make_trainer):
    lines = progress(make_trainer, is_terminal=False, logging_steps=3).splitlines()
    assert len(lines) == 3
    for step, line in zip((1, 3, 6), lines, strict=True):
        assert re.fullmatch(rf"step      {step}/6  {FACTS}", line), line


def test_the_last_line_has_no_time_left(make_trainer):
    assert progress(make_trainer, is_terminal=False).splitlines()[-1].split("  lr ")[0].endswith("ETA 0:00")


def test_the_evaluation_of_the_base_does_not_count_as_time_of_a_step(make_trainer, dataset):
    class Slow(Callback):
        def on_evaluate(self, trainer, eval_loss):
            if trainer.state.step == 0:
                time.sleep(1)

    text = io.StringIO()
    callbacks = [ProgressCallback(Console(file=text)), Slow()]
    make_trainer(callbacks=callbacks, eval_dataset=dataset, max_steps=60).train()
    minutes, seconds = re.search(r"step +1/60 .*ETA (\d+):(\d\d)", text.getvalue()).groups()
    assert 60 * int(minutes) + int(seconds) < 59


def test_each_evaluation_is_a_line_that_says_which_is_the_lowest(make_trainer, dataset):
    lines = progress(make_trainer, is_terminal=False, eval_dataset=dataset, eval_steps=3, logging_steps=6).splitlines()
    held_out = [line for line in lines if "held-out loss" in line]
    assert [bool(re.fullmatch(r"step +\d  held-out loss \d\.\d{4}", line)) for line in held_out] == [True, False, False]
    assert [line.endswith("(lowest so far)") for line in held_out] == [False, True, True]
    assert re.fullmatch(rf"step      6/6  {FACTS}", lines[-1]), lines[-1]


def test_no_evaluation_above_the_start_is_called_the_lowest(make_trainer, dataset):
    spoiled = {"eval_dataset": dataset, "eval_steps": 3, "logging_steps": 6, "learning_rate": 10.0}
    text = progress(make_trainer, is_terminal=False, **spoiled)
    assert text.count("held-out loss") == 3
    assert "lowest" not in text


def test_a_run_that_a_callback_ends_says_why(make_trainer):
    class Stop(Callback):
        def on_step_end(self, trainer, record):
            trainer.state.should_stop, trainer.state.stop_reason = record.step == 2, "[enough] is learned"

    text = io.StringIO()
    make_trainer(callbacks=[ProgressCallback(Console(file=text)), Stop()]).train()
    assert text.getvalue().splitlines()[-1] == "stopped at step 2: [enough] is learned"


def test_on_a_terminal_one_line_moves_and_is_gone_at_the_end(make_trainer, dataset):
    text = progress(make_trainer, is_terminal=True, eval_dataset=dataset, eval_steps=6, logging_steps=1)
    assert "6/6" in text
    assert "held-out loss" in text
    assert not re.search(r"/6  loss", text), "a plain line has no bar"
    assert text.endswith("\x1b[2K")  # The line is erased.


def test_a_terminal_of_80_columns_has_room_for_step_and_time_left(make_trainer):
    trainer, text = make_trainer(), io.StringIO()
    trainer.state.total_steps = 3500
    callback = ProgressCallback(Console(file=text, force_terminal=True, width=80))
    callback.on_train_begin(trainer)
    callback._eval_loss = 2.547
    callback.on_step_end(trainer, StepRecord(3500, 2.035, 1.0, 2e-3, 100, 13_047, 1.0))
    callback.on_train_end(trainer)
    assert re.search(r"3500/3500 .*ETA 0:00", text.getvalue())


def test_the_time_left_after_a_resume_counts_the_steps_of_this_run_alone(make_trainer, run):
    make_trainer(run_dir=run, max_steps=3).train()
    callback = ProgressCallback(Console(file=io.StringIO()))
    make_trainer(run_dir=run, callbacks=[callback]).train(resume=True)
    assert callback._first_step == 3


@pytest.mark.parametrize(
    ("num_rows", "least_seconds", "is_said"),
    [
        pytest.param(600, 0.0, True, id="much beside two updates"),
        pytest.param(600, 600.0, False, id="a short time"),
        pytest.param(1, 0.0, False, id="little beside them"),
    ],
)
def test_evaluations_that_take_much_of_a_run_are_said_to(
    make_trainer, dataset, caplog, num_rows, least_seconds, is_said
):
    caplog.set_level("INFO", "smolora.training.callbacks")
    held_out = TokenDataset([dataset[number % len(dataset)] for number in range(num_rows)])
    callbacks = [EvaluationTimeCallback(least_seconds)]
    make_trainer(eval_dataset=held_out, callbacks=callbacks, max_steps=2, eval_steps=2).train()
    assert caplog.text.count("data.max_validation_rows below 600 makes them shorter") == is_said
