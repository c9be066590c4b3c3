"""Gradient norms on Hugging Face's own Trainer: unclipped, whole steps, and the same as ours."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import Trainer, TrainingArguments

from smolora.adapters.attach import setup_model_with_lora
from smolora.config import LoRAConfig
from smolora.integrations.hf_trainer import GradientMeasuringTrainer, to_trainer_callback
from smolora.records.gradient_log import GradientNormLog
from smolora.training.gradients import GradientNormCallback
from tests.tiny import random_input_ids, tiny_model

ROWS = [{"input_ids": ids, "labels": ids} for ids in (random_input_ids(10, seed=seed)[0] for seed in range(8))]


def arguments(folder, **changes):
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "max_grad_norm": 1e-3,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(folder), **{**settings, **changes})


def measuring_trainer(model, norms, args):
    return GradientMeasuringTrainer(model=model, args=args, train_dataset=ROWS, gradient_callback=norms)


def plain_trainer(model, norms, args):
    return Trainer(model=model, args=args, train_dataset=ROWS, callbacks=[to_trainer_callback(norms)])


@pytest.fixture(params=[measuring_trainer, plain_trainer])
def trainer_of(request):
    return request.param


def run_one(trainer_of, folder, **changes):
    torch.manual_seed(0)
    model = setup_model_with_lora(tiny_model("llama"), LoRAConfig(r=2, lora_dropout=0.0))
    trainer = trainer_of(model, GradientNormCallback(GradientNormLog(folder)), arguments(folder, **changes))
    trainer.train()
    return trainer, GradientNormLog(folder)


def test_totals_are_the_unclipped_norms_that_hugging_face_logs(trainer_of, tmp_path):
    trainer, log = run_one(trainer_of, tmp_path)
    logged = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    rows = log.read_groups()
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert min(logged) > 1e-3, "clipping is at work"
    # Hugging Face rounds nothing, but adds up in float32.
    assert [row["total"] for row in rows] == pytest.approx(logged, rel=1e-5)
    assert all(math.isclose(row["total"] ** 2, row["attention"] ** 2 + row["mlp"] ** 2, rel_tol=1e-6) for row in rows)


def test_only_logged_steps_have_a_row(trainer_of, tmp_path):
    _, log = run_one(trainer_of, tmp_path, logging_steps=2, max_steps=4)
    assert [row["step"] for row in log.read_groups()] == [2, 4]


def test_both_ways_measure_the_same(tmp_path):
    first, second = (run_one(way, tmp_path / way.__name__)[1] for way in (measuring_trainer, plain_trainer))
    assert first.read_groups() == second.read_groups()
    assert first.read_layers() == second.read_layers()


def test_measuring_leaves_no_hook_behind(tmp_path):
    trainer, _ = run_one(plain_trainer, tmp_path)
    assert not any(p._post_accumulate_grad_hooks for p in trainer.model.parameters() if p.requires_grad)


def test_the_summary_is_written_at_the_end(trainer_of, tmp_path):
    run_one(trainer_of, tmp_path)
    assert (tmp_path / "gradient_analysis.summary.json").is_file()
