"""Runs on a base of few bits: they learn like the plain one, resume to the same bits, merge and answer."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from smolora.adapters.attach import attach_adapter
from smolora.adapters.store import load_bundle, save_adapter
from smolora.config import ExperimentConfig, LoRAConfig, resolve_config
from smolora.errors import ConfigError, ModelError, StoppedBySignal
from smolora.generation.sampling import SamplingSettings
from smolora.models.loading import load_model
from smolora.recipes.finetune import finetune
from smolora.recipes.generate import generate
from smolora.recipes.merge import merge
from smolora.training.callback import Callback
from tests.tiny import HAS_BITSANDBYTES, WHOLE_BLOCKS, needs_bitsandbytes, save_tiny_model

KINDS = ("8bit", "4bit")
NUMBERS = ["one", "two", "three", "four", "five", "six"]


@pytest.fixture
def base(tmp_path):
    return save_tiny_model("llama", tmp_path / "base", **WHOLE_BLOCKS["llama"])


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    pairs = [(f"{a} and {b} of {c}", f"{b} {a}") for a in NUMBERS for b in NUMBERS for c in NUMBERS[:2]]
    file.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    return file


def config(base, rows, kind, *assignments):
    settings = [f"model.name_or_path={base}", f"data.sources={rows}", f"model.quantization={kind}"]
    steps = ["training.learning_rate=1e-2", "training.max_steps=12", "training.eval_steps=3", "training.save_steps=3"]
    return resolve_config(ExperimentConfig, assignments=[*settings, *steps, *assignments])


class Interrupt(Callback):
    """Asks the run to stop in step 5, after an evaluation."""

    def on_step_begin(self, trainer):
        if trainer.state.step == 4:
            os.kill(os.getpid(), signal.SIGINT)


def adapter_bytes(run):
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def held_out_losses(run):
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [line["eval_loss"] for line in lines if line.get("eval_loss") is not None]


@pytest.mark.skipif(HAS_BITSANDBYTES, reason="bitsandbytes is installed")
@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_library_leaves_no_folder(tmp_path, rows, kind):
    with pytest.raises(ConfigError, match="needs bitsandbytes"):
        finetune(config(tmp_path / "no-model", rows, kind), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls_like_the_plain_run_s_and_every_tensor_moves(tmp_path, base, rows, kind, dtype):
    plain, run = (finetune(config(base, rows, way, f"model.dtype={dtype}"), tmp_path / way) for way in ("none", kind))
    losses = held_out_losses(run)
    assert losses[-1] < losses[0] - 2
    assert losses[-1] == pytest.approx(held_out_losses(plain)[-1], abs=0.1)
    save_adapter(
        attach_adapter(load_model(base, quantization=kind), LoRAConfig(), seed=0), tmp_path / "start"
    )  # The run's own start: the seed is its default.
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "start", run.adapter))
    assert before.keys() == after.keys()
    assert all((before[name] != after[name]).any() for name in before)
    assert json.loads(run.env.read_text())["quantization"] == f"{kind}: all 14 linear layers but the head"


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, base, rows, kind):
    whole = finetune(config(base, rows, kind), tmp_path / "whole")
    with pytest.raises(StoppedBySignal, match="SIGINT after step 5"):
        finetune(config(base, rows, kind), tmp_path / "run", callbacks=[Interrupt()])
    run = finetune(config(base, rows, kind), tmp_path / "run", resume=True)
    assert adapter_bytes(run) == adapter_bytes(whole)


@needs_bitsandbytes
def test_how_the_base_is_held_cannot_change_within_a_run(tmp_path, base, rows):
    run = finetune(config(base, rows, "8bit"), tmp_path / "run")
    with pytest.raises(ConfigError, match="model.quantization can't change within a run: it was '8bit', now '4bit'"):
        finetune(config(base, rows, "4bit"), tmp_path / "run", resume=True)
    run.resolved_config.unlink()  # Then the checkpoint alone knows.
    with pytest.raises(ModelError, match="was written with other settings"):
        finetune(config(base, rows, "4bit"), tmp_path / "run", resume=True)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_answers_as_its_merged_model_does(tmp_path, base, rows, kind):
    run = finetune(config(base, rows, kind, "model.dtype=float32"), tmp_path / "run")
    greedy = SamplingSettings(max_new_tokens=6, temperature=0.0)
    answer = generate(str(run.path), "two and five of one", greedy)
    merge(run.path)
    assert load_bundle(run.path).quantization == kind  # The adapter still comes first.
    assert generate(str(run.merged), "two and five of one", greedy) == answer


@needs_bitsandbytes
def test_training_goes_on_from_an_adapter_on_the_base_as_it_was_held(tmp_path, base, rows):
    first = finetune(config(base, rows, "4bit"), tmp_path / "first")
    second = finetune(config(base, rows, "4bit", f"adapter.path={first.path}"), tmp_path / "second")
    assert held_out_losses(second)[0] == pytest.approx(min(held_out_losses(first)), abs=1e-6)
    assert torch.isfinite(torch.tensor(held_out_losses(second))).all()
