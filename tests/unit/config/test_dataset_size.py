"""Settings for a number of rows: the stated rules, and nothing that was set is overridden."""

from __future__ import annotations

import pytest

from smolora.config import ExperimentConfig, ModelConfig, SpeedConfig, TrainingConfig, optimize_for_dataset_size
from smolora.errors import ConfigError

MODEL = ModelConfig(name_or_path="m")


@pytest.mark.parametrize(
    ("rows", "rows_per_step", "epochs"),
    [(1, 4, 5), (999, 4, 5), (1_000, 8, 3), (4_999, 8, 3), (5_000, 16, 2), (50_000, 32, 1), (10**6, 32, 1)],
)
def test_few_rows_are_passed_over_more_often_in_smaller_updates(rows, rows_per_step, epochs):
    training = optimize_for_dataset_size(TrainingConfig(), rows)
    assert (training.rows_per_step, training.num_train_epochs) == (rows_per_step, epochs)


@pytest.mark.parametrize(
    ("rows", "warmup", "eval_steps", "logging_steps"),
    [
        (100, 0.1, 25, 2),  # 125 updates
        (800, 0.1, 200, 20),  # 1,000
        (900, 100, 113, 22),  # 1,125
        (10**6, 100, 3125, 50),  # 31,250
    ],
)
def test_intervals_and_warm_up_follow_the_number_of_updates(rows, warmup, eval_steps, logging_steps):
    training = optimize_for_dataset_size(TrainingConfig(), rows)
    assert training.warmup_steps == warmup
    assert (training.eval_steps, training.save_steps) == (eval_steps, eval_steps)
    assert training.logging_steps == logging_steps


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_train_epochs", 1.0),
        ("max_steps", 7),
        ("per_device_train_batch_size", 3),
        ("gradient_accumulation_steps", 2),
        ("warmup_steps", 0.1),
        ("logging_steps", 10),
        ("save_steps", 100),
        ("eval_steps", 9),
        ("learning_rate", 2e-4),
    ],
)
def test_what_was_set_stays_even_at_its_default(name, value):
    training = optimize_for_dataset_size(TrainingConfig(**{name: value}), 2_000)
    assert training.__dict__[name] == value


def test_max_steps_alone_decides_and_epochs_are_left():
    training = optimize_for_dataset_size(TrainingConfig(max_steps=50), 2_000)
    assert training.num_train_epochs == TrainingConfig().num_train_epochs
    assert (training.eval_steps, training.logging_steps) == (10, 1)


def test_rows_an_update_are_split_over_the_passes_that_were_set():
    training = optimize_for_dataset_size(TrainingConfig(gradient_accumulation_steps=4), 2_000)
    assert (training.per_device_train_batch_size, training.rows_per_step) == (2, 8)


def test_checkpoints_follow_the_evaluations_that_were_set():
    assert optimize_for_dataset_size(TrainingConfig(eval_steps=9), 2_000).save_steps == 9


def test_a_whole_run_is_changed_in_its_training_alone():
    config = ExperimentConfig(model=MODEL, training=TrainingConfig(seed=5))
    sized = optimize_for_dataset_size(config, 100)
    assert sized.training == optimize_for_dataset_size(config.training, 100)
    assert sized.replace(training=config.training) == config
    assert config.training == TrainingConfig(seed=5)


def test_passes_made_by_tokens_keep_their_rows_and_intervals():
    config = ExperimentConfig(model=MODEL, speed=SpeedConfig(max_tokens_per_batch=512))
    training = optimize_for_dataset_size(config, 100).training
    assert training.model_fields_set == {"num_train_epochs"}


def test_no_rows_are_refused():
    with pytest.raises(ConfigError, match="a run learns from one row at least, found 0"):
        optimize_for_dataset_size(TrainingConfig(), 0)
