"""A tuning run that is killed at random moments and resumed each time leaves the adapter of one that never stopped.

It lasts a random share of what a whole run takes, so that its kill falls into reading, training, evaluating, saving or
the last write of the adapter.
"""

from __future__ import annotations

import json
import os
import random

import pytest

from smolora.config import ExperimentConfig, resolve_config
from smolora.recipes.finetune import finetune
from smolora.records.staging import hash_folder
from tests.integration.killing import end_under_kills
from tests.tiny import save_tiny_model

NUMBERS = ["one", "two", "three", "four", "five", "six"]
STEPS = 10


def settings(base, rows):
    """Dropout on, a held-out loss every second step so that the best one moves, and checkpoints that are pruned."""
    values = {
        "model.name_or_path": base,
        "model.dtype": "float32",
        "data.sources": rows,
        "data.validation_fraction": 0.2,
        "adapter.r": 2,
        "adapter.lora_dropout": 0.1,
        "training.learning_rate": 1.0,
        "training.lr_scheduler_type": "constant",
        "training.max_steps": STEPS,
        "training.eval_steps": 2,
        "training.save_steps": 3,
        "training.save_total_limit": 1,
        "training.logging_steps": 1,
    }
    return resolve_config(ExperimentConfig, assignments=[f"{name}={value}" for name, value in values.items()])


def describe_end(run):
    """Return what a run leaves: the adapter, the last state and the curve."""
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    curve = [(line["step"], line.get("loss"), line.get("eval_loss")) for line in lines]
    state = json.loads((run.checkpoint_path(STEPS) / "state.json").read_text())["trainer"]
    files = sorted(path.name for path in run.path.iterdir())
    return {"adapter": hash_folder(run.adapter), "best": state["best_step"], "curve": curve, "files": files}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX processes")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("kills", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_random_kills_of_a_recipe_change_no_byte_of_the_adapter(tmp_path, kills):
    base, rows = save_tiny_model("llama", tmp_path / "base"), tmp_path / "rows.jsonl"
    pairs = [
        {"prompt": f"{a} and {b} of {c}", "completion": f"{b} {a}"} for a in NUMBERS for b in NUMBERS for c in "xy"
    ]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    config, shares = settings(base, rows), random.Random(0)
    found = end_under_kills(
        lambda run: finetune(config, run.path, resume=True),
        describe_end,
        tmp_path,
        kills=kills,
        draw_share=lambda: shares.uniform(0.2, 0.9),
    )
    assert found["kills"] == kills
    assert 0 < found["reference"]["best"] < 10, "an older checkpoint than the last is the best"
    assert all(end == found["reference"] for end in found["ends"])
