"""TrainingConfig on Hugging Face's own Trainer: every field arrives or is said to be lost; the curve is the same."""

from __future__ import annotations

import logging

import pytest
from transformers import Trainer

from smolora.config import TrainingConfig
from smolora.integrations.hf_arguments import to_training_arguments
from smolora.integrations.hf_trainer import to_trainer_callback
from smolora.training.schedules import ScheduleWindow
from tests.tiny import random_input_ids, tiny_model

ROWS = [{"input_ids": ids, "labels": ids} for ids in (random_input_ids(10, seed=seed)[0] for seed in range(8))]
QUIET = {"use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False}
CHANGED = {
    "learning_rate": 1e-3,
    "max_steps": 7,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "warmup_steps": 2.0,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "logging_steps": 5,
    "save_steps": 6,
    "save_total_limit": 4,
    "eval_steps": 9,
    "gradient_checkpointing": True,
    "seed": 11,
}
LOST = {"profile_steps", "report_to"}
"""One has no counterpart; the other names packages that must be there, and has a test of its own."""


def test_every_field_arrives_or_is_known_to_have_no_counterpart(tmp_path):
    assert set(TrainingConfig.model_fields) == set(CHANGED) | LOST
    arguments = TrainingConfig(**CHANGED).to_training_arguments(tmp_path)
    assert {name: vars(arguments)[name] for name in CHANGED} == CHANGED
    assert arguments.eval_strategy == "steps"
    assert (arguments.logging_first_step, arguments.logging_nan_inf_filter) == (True, False)


def test_what_is_left_out_means_the_same_there(tmp_path):
    arguments = to_training_arguments(TrainingConfig(), tmp_path)
    assert (arguments.max_steps, arguments.eval_strategy, arguments.report_to) == (-1, "no", [])


def test_arguments_of_theirs_win(tmp_path):
    assert TrainingConfig(seed=1).to_training_arguments(tmp_path, seed=5).seed == 5


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (TrainingConfig(profile_steps=(1, 2)), "training.profile_steps has no counterpart"),
        (TrainingConfig(lr_scheduler_type="one_cycle"), "one_cycle is cosine"),
    ],
)
def test_what_is_lost_is_said(tmp_path, caplog, config, said):
    with caplog.at_level(logging.WARNING, logger="smolora"):
        to_training_arguments(config, tmp_path)
    assert said in caplog.text


@pytest.mark.parametrize("curve", ["linear", "cosine", "constant", "one_cycle"])
def test_their_trainer_follows_our_curve(tmp_path, curve):
    config = TrainingConfig(
        max_steps=6, warmup_steps=2, lr_scheduler_type=curve, logging_steps=1, per_device_train_batch_size=2
    )
    trainer = Trainer(
        model=tiny_model("llama"), args=config.to_training_arguments(tmp_path, **QUIET), train_dataset=ROWS
    )
    trainer.add_callback(to_trainer_callback(config))
    trainer.train()
    window = ScheduleWindow.over(0, 6, warmup_steps=2)
    found = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
    assert found == pytest.approx([config.learning_rate * window.factor(curve, step) for step in range(6)])


def test_a_resumed_run_of_theirs_goes_on_along_our_curve(tmp_path):
    config = TrainingConfig(max_steps=4, logging_steps=1, save_steps=2, per_device_train_batch_size=2)
    loud = {name: value for name, value in QUIET.items() if name != "save_strategy"}
    rates = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        args = config.to_training_arguments(tmp_path, **loud)
        trainer = Trainer(model=tiny_model("llama"), args=args, train_dataset=ROWS)
        trainer.add_callback(to_trainer_callback(config))
        trainer.train(resume_from_checkpoint=resume)
        rates.append([line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line])
    assert rates[0] == pytest.approx(rates[1])
