"""Gradient norms on Hugging Face's own Trainer: unclipped, whole steps, and the same as ours."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from smolora.adapters.attach import setup_model_with_lora
from smolora.config import DynamicLoRAConfig, LoRAConfig
from smolora.errors import BrokenRunError, ConfigError
from smolora.integrations.hf_trainer import GradientMeasuringTrainer, to_trainer_callback
from smolora.records.gradient_log import GradientNormLog
from smolora.training.gradients import GradientNormCallback
from smolora.training.phases import DynamicLoRACallback
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


class CountsCopies(GradientNormCallback):
    """Counts how often the weights are copied."""

    copies = 0

    def keep_weights(self):
        self.copies += 1
        super().keep_weights()


@pytest.mark.parametrize(("settings", "copies"), [({"logging_steps": 2}, 2), ({"logging_first_step": True}, 1)])
def test_weights_are_copied_in_logged_steps_only(trainer_of, tmp_path, settings, copies):
    model = setup_model_with_lora(tiny_model("llama"), LoRAConfig(r=2, lora_dropout=0.0))
    norms = CountsCopies()
    trainer_of(model, norms, arguments(tmp_path, max_steps=4, **{"logging_steps": 9, **settings})).train()
    assert norms.copies == copies


def test_norms_are_those_without_the_scale_of_float16(trainer_of, tmp_path):
    _, plain = run_one(trainer_of, tmp_path / "plain", max_grad_norm=0.0)
    torch.manual_seed(0)
    model = setup_model_with_lora(tiny_model("llama"), LoRAConfig(r=2, lora_dropout=0.0))
    norms = GradientNormCallback(GradientNormLog(tmp_path / "scaled"))
    trainer = trainer_of(model, norms, arguments(tmp_path / "scaled", max_grad_norm=0.0))
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")  # accelerate makes one for float16, which wants a GPU.
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == 2.0**16, "no step was skipped"
    scaled = [row["total"] for row in norms.log.read_groups()]
    # The scale is a power of two, so that only the sum over the ranks of LoRA may round otherwise.
    assert scaled == pytest.approx([row["total"] for row in plain.read_groups()], rel=1e-6)


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


class Watch(TrainerCallback):
    """Keeps the adapter before each update, and after the last one."""

    def __init__(self):
        self.weights = []

    def _keep(self, model):
        self.weights.append({name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name})

    def on_step_begin(self, args, state, control, model, **_):
        self._keep(model)

    def on_train_end(self, args, state, control, model, **_):
        self._keep(model)


def run_phases(folder, *callbacks, **settings):
    model = setup_model_with_lora(tiny_model("llama"), LoRAConfig(r=2, lora_dropout=0.0))
    phases = DynamicLoRACallback(DynamicLoRAConfig(**settings))
    added = [to_trainer_callback(phases), *callbacks]
    args = arguments(folder, max_steps=6, weight_decay=0.1)
    Trainer(model=model, args=args, train_dataset=ROWS, callbacks=added).train()
    return model, phases


@pytest.mark.parametrize("strategy", ["both,mlp,attn", "early,late"])
def test_phases_move_only_their_tensors_on_hugging_face_too(tmp_path, strategy):
    watch = Watch()
    model, phases = run_phases(tmp_path, watch, strategy=strategy, moments="reset")
    assert [report["problems"] for report in phases.reports] == [[]] * len(strategy.split(","))
    for report in phases.reports:
        before, after = watch.weights[report["start"]], watch.weights[report["end"]]
        assert {name for name in before if not torch.equal(before[name], after[name])} == set(report["declared"])
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)


def tuned(folder):
    model = setup_model_with_lora(tiny_model("llama"), LoRAConfig(r=2, lora_dropout=0.0))
    return {"model": model, "args": arguments(folder, max_steps=6), "train_dataset": ROWS}


def phases_first(norms, phases, folder):
    return Trainer(**tuned(folder), callbacks=[to_trainer_callback(phases), to_trainer_callback(norms)])


def norms_first(norms, phases, folder):
    return Trainer(**tuned(folder), callbacks=[to_trainer_callback(norms), to_trainer_callback(phases)])


def measured_by_the_trainer(norms, phases, folder):
    return GradientMeasuringTrainer(**tuned(folder), callbacks=[to_trainer_callback(phases)], gradient_callback=norms)


@pytest.mark.parametrize("make", [phases_first, norms_first, measured_by_the_trainer])
def test_each_step_is_logged_with_its_phase(tmp_path, make):
    norms = GradientNormCallback(GradientNormLog(tmp_path))
    make(norms, DynamicLoRACallback(DynamicLoRAConfig(strategy="both,mlp,attn")), tmp_path).train()
    assert [row["phase"] for row in norms.log.read_groups()] == [1, 1, 2, 2, 3, 3]
    assert [row["phase"] for row in norms.log.read_layers()] == [1, 1, 2, 2, 3, 3]


def test_callbacks_that_are_used_again_start_afresh_on_hugging_face_too(tmp_path):
    norms, phases = GradientNormCallback(), DynamicLoRACallback(DynamicLoRAConfig(strategy="both,mlp,attn"))
    for number in range(2):
        norms_first(norms, phases, tmp_path / str(number)).train()
    assert len(phases.reports) == 3
    assert norms.summary.to_state()["statistics"]["groups/total/norm"][0] == 6


def test_the_certificates_are_written_on_hugging_face_too(tmp_path):
    path = tmp_path / "out" / "phase_report.json"
    phases = DynamicLoRACallback(DynamicLoRAConfig(strategy="both,mlp,attn"), report_path=path)
    Trainer(**tuned(tmp_path), callbacks=[to_trainer_callback(phases)]).train()
    report = json.loads(path.read_text())
    assert report["starts"] == [0, 2, 4]
    assert report["phases"] == phases.reports
    assert [phase["selects"] for phase in report["phases"]] == ["attention and mlp", "mlp", "attention"]


def test_a_resume_keeps_the_certificates_of_phases_that_ended_before(tmp_path):
    path = tmp_path / "phase_report.json"

    def train(*callbacks, **options):
        phases = DynamicLoRACallback(DynamicLoRAConfig(strategy="both,mlp,attn"), report_path=path)
        parts = {**tuned(tmp_path / "out"), "args": arguments(tmp_path / "out", max_steps=6, save_steps=3)}
        parts["args"].set_save(strategy="steps", steps=3)
        Trainer(**parts, callbacks=[to_trainer_callback(phases), *callbacks]).train(**options)

    with pytest.raises(ZeroDivisionError):
        train(Fail(4))
    [first, _] = json.loads(path.read_text())["phases"]
    train(resume_from_checkpoint=True)
    found = json.loads(path.read_text())["phases"]
    assert found[0] == first
    assert [(phase["start"], phase["end"]) for phase in found] == [(0, 2), (3, 4), (4, 6)]


class Fail(TrainerCallback):
    """Ends a run in the step after `step` updates."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise ZeroDivisionError


def test_an_epoch_is_counted_in_updates(tmp_path):
    _, phases = run_phases(tmp_path, table=[{}, {"groups": "mlp", "start": {"epoch": 1}}])
    assert [(report["start"], report["end"]) for report in phases.reports] == [(0, 2), (2, 6)]


def test_a_frozen_tensor_that_is_written_to_fails_the_run_on_hugging_face_too(tmp_path):
    class Write(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **_):
            if state.global_step == 4:
                with torch.no_grad():
                    next(p for name, p in model.named_parameters() if "mlp" in name and "lora_B" in name).add_(1e-3)

    with pytest.raises(BrokenRunError, match="phase 3.*moved though frozen"):
        run_phases(tmp_path, Write(), strategy="both,mlp,attn")


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "early,late", "learning_rate": "restart"},
        {"table": [{}, {"start": {"plateau": {"metric": "loss"}}}]},
    ],
)
def test_phases_that_need_our_loop_are_refused(settings):
    with pytest.raises(ConfigError, match="smolora's own Trainer"):
        to_trainer_callback(DynamicLoRACallback(DynamicLoRAConfig(**settings)))
