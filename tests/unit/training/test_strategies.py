"""Strategies: a curve and listeners, on a trainer made by hand and through a recipe."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from torch.testing import assert_close

from smolora.config import EvaluationConfig, ExperimentConfig, ModelConfig
from smolora.data.token_dataset import TokenDataset, build_example
from smolora.errors import ConfigError
from smolora.training.callback import Callback
from smolora.training.callbacks import EarlyStoppingCallback, PlateauRateCallback
from smolora.training.schedules import schedule_factor
from smolora.training.strategies import AdaptiveLRStrategy, EarlyStoppingStrategy, TrainingStrategy
from tests.unit.training.recorder import Recorder, weights


@pytest.fixture
def unlike():
    """Held-out rows of tokens that no training row has: their loss rises with every update."""
    rows = np.random.default_rng(1).integers(100, 150, size=(4, 12)).tolist()
    return TokenDataset([build_example(row, [(1, len(row))]) for row in rows])


def rates(recorder):
    return [record.learning_rate for record in recorder.records]


def run_with(strategy, make_trainer, *, resume=False, callbacks=(), **settings):
    recorder = Recorder()
    trainer = make_trainer(callbacks=[recorder, *callbacks], **settings)
    strategy.prepare_trainer(trainer)
    trainer.train(resume=resume)
    return trainer, recorder


def test_a_plain_strategy_changes_nothing(make_trainer):
    plain, plain_recorder = make_trainer(callbacks=[recorder := Recorder()]), recorder
    plain.train()
    trainer, found = run_with(TrainingStrategy(), make_trainer)
    assert rates(found) == rates(plain_recorder)
    assert_close(weights(trainer), weights(plain), rtol=0, atol=0)


def test_the_adaptive_rate_is_a_cosine_with_warm_up_that_every_plateau_halves(make_trainer, unlike, caplog):
    caplog.set_level("INFO", logger="smolora")
    settings = {"eval_dataset": unlike, "eval_steps": 2, "max_steps": 8}
    _, recorder = run_with(AdaptiveLRStrategy(warmup_steps=2, patience=1), make_trainer, **settings)
    curve = [1e-2 * schedule_factor("cosine", step, warmup_steps=2, total_steps=8) for step in range(8)]
    lowered = [rate * 0.5 ** (step // 2) for step, rate in enumerate(curve)]
    assert rates(recorder) == pytest.approx(lowered, rel=1e-12)
    assert re.search(r"no held-out loss below \d\.\d{4} in 1 evaluation; the rate is now 0\.5 of", caplog.text)


def test_a_falling_loss_keeps_the_curve(make_trainer, dataset):
    settings = {"eval_dataset": dataset, "eval_steps": 2, "max_steps": 6}
    _, recorder = run_with(AdaptiveLRStrategy(warmup_steps=0, patience=1), make_trainer, **settings)
    curve = [1e-2 * schedule_factor("cosine", step, warmup_steps=0, total_steps=6) for step in range(6)]
    assert rates(recorder) == pytest.approx(curve, rel=1e-12)


def test_a_resume_under_a_lowered_rate_is_bit_equal_to_never_stopping(make_trainer, unlike, run):
    class Stop(Exception):
        pass

    class Crash(Callback):
        def on_step_begin(self, trainer):
            if trainer.state.step == 5:
                raise Stop

    settings = {"eval_dataset": unlike, "eval_steps": 2, "max_steps": 8, "dropout": 0.1}
    whole, expected = run_with(AdaptiveLRStrategy(patience=1), make_trainer, **settings)
    assert math.prod(callback.learning_rate_factor for callback in whole.callbacks) == 0.5**4
    with pytest.raises(Stop):
        run_with(AdaptiveLRStrategy(patience=1), make_trainer, run_dir=run, callbacks=[Crash()], **settings)
    resumed, found = run_with(AdaptiveLRStrategy(patience=1), make_trainer, run_dir=run, resume=True, **settings)
    assert rates(found) == rates(expected)[5:]
    assert_close(weights(resumed), weights(whole), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        pytest.param(
            AdaptiveLRStrategy(warmup_steps=7, patience=3, factor=0.1),
            {"lr_scheduler_type": "cosine", "warmup_steps": 7, "plateau_patience": 3, "plateau_factor": 0.1},
            id="adaptive rate",
        ),
        pytest.param(
            EarlyStoppingStrategy(patience=3, threshold=0.5),
            {"early_stopping_patience": 3, "early_stopping_threshold": 0.5},
            id="early stopping",
        ),
    ],
)
def test_a_strategy_writes_its_settings_into_the_configuration(strategy, settings):
    config = strategy.configure(ExperimentConfig(model=ModelConfig(name_or_path="base")))
    assert (vars(config.training) | vars(config.evaluation)).items() >= settings.items()


def test_what_the_configuration_brought_is_not_added_again(make_trainer, dataset):
    trainer = make_trainer(eval_dataset=dataset, callbacks=[PlateauRateCallback(1)])
    AdaptiveLRStrategy().prepare_trainer(trainer)
    assert sum(isinstance(callback, PlateauRateCallback) for callback in trainer.callbacks) == 1


@pytest.mark.parametrize("strategy", [AdaptiveLRStrategy(), EarlyStoppingStrategy()])
def test_without_held_out_rows_there_is_nothing_to_look_at(make_trainer, strategy):
    with pytest.raises(ConfigError, match="looks at the held-out loss, and no rows are held out"):
        strategy.prepare_trainer(make_trainer())


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        pytest.param([3.0, 2.0, 1.0], [], id="each improves"),
        pytest.param([3.0, 3.0, 3.0], [2], id="none improves"),
        pytest.param([3.0, math.nan, math.nan], [2], id="NaN never improves"),
        pytest.param([math.nan, math.nan], [1], id="NaN from the start"),
        pytest.param([3.0, None, None], [2], id="null, as metrics.jsonl writes NaN"),
    ],
)
def test_early_stopping_counts_evaluations(losses, expected):
    strategy = EarlyStoppingStrategy(patience=2)
    assert [at for at, loss in enumerate(losses) if strategy.should_stop_early({"eval_loss": loss})] == expected


def test_metrics_of_steps_never_stop_a_run():
    strategy = EarlyStoppingStrategy(patience=1)
    assert not any(strategy.should_stop_early({"step": step, "loss": 9.0}) for step in range(50))


def test_an_evaluation_without_the_loss_is_refused_by_what_it_has():
    with pytest.raises(ConfigError, match="looks at eval_loss, and this evaluation gave eval_accuracy"):
        EarlyStoppingStrategy().should_stop_early({"eval_accuracy": 0.5})


def test_early_stopping_stops_the_loop_and_stays_stopped(make_trainer, unlike, run):
    settings = {"eval_dataset": unlike, "eval_steps": 1, "max_steps": 6, "run_dir": run}
    trainer, _ = run_with(EarlyStoppingStrategy(patience=2), make_trainer, **settings)
    assert (trainer.state.step, trainer.state.stop_reason) == (2, "EarlyStoppingStrategy said so")
    resumed, recorder = run_with(EarlyStoppingStrategy(patience=2), make_trainer, resume=True, **settings)
    assert (resumed.state.step, recorder.records) == (2, [])


def test_early_stopping_that_the_configuration_brought_too_says_why(make_trainer, unlike):
    settings = {"eval_dataset": unlike, "eval_steps": 1, "max_steps": 6, "callbacks": [EarlyStoppingCallback(2)]}
    trainer, _ = run_with(EarlyStoppingStrategy(patience=2), make_trainer, **settings)
    assert trainer.state.stop_reason == "the held-out loss has not improved for 2 evaluations"


@pytest.mark.parametrize("says_why", [True, False])
def test_a_run_whose_base_is_good_enough_is_refused_with_the_reason(make_trainer, dataset, says_why):
    class GoodAlready(TrainingStrategy):
        def should_stop_early(self, metrics):
            return True

    class Stops(Callback):
        def on_train_begin(self, trainer):
            trainer.state.should_stop = True

    strategy, callbacks = (GoodAlready(), []) if says_why else (TrainingStrategy(), [Stops()])
    reason = "GoodAlready said so" if says_why else "a callback ended the run"
    with pytest.raises(ConfigError, match=rf"{reason} before the first step at a held-out loss of \d\.\d{{4}}"):
        run_with(strategy, make_trainer, eval_dataset=dataset, callbacks=callbacks)


def test_one_strategy_starts_each_run_afresh(make_trainer, unlike):
    strategy = EarlyStoppingStrategy(patience=2)
    settings = {"eval_dataset": unlike, "eval_steps": 1, "max_steps": 6}
    assert [run_with(strategy, make_trainer, **settings)[0].state.step for _ in range(2)] == [2, 2]


def test_a_strategy_of_ones_own_is_asked_after_each_evaluation_alone(make_trainer, dataset):
    asked = []

    class Listens(TrainingStrategy):
        def should_stop_early(self, metrics):
            asked.append((metrics["step"], math.isfinite(metrics["eval_loss"])))
            return metrics["step"] == 4

    trainer, _ = run_with(Listens(), make_trainer, eval_dataset=dataset, eval_steps=2, max_steps=6)
    assert asked == [(0, True), (2, True), (4, True)]
    assert trainer.state.step == 4


def test_the_state_of_a_plateau_is_json():
    callback, again = PlateauRateCallback(patience=1), PlateauRateCallback(patience=1)
    json.dumps(callback.state_dict(), allow_nan=False)
    again.load_state_dict(json.loads(json.dumps(callback.state_dict())))
    assert again.state_dict() == callback.state_dict()


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_a_factor_lies_between_0_and_1(value):
    with pytest.raises(ConfigError, match="plateau_factor"):
        EvaluationConfig(plateau_factor=value)
