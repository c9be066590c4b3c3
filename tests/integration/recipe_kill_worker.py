"""Tunes through the recipe in children that are killed at random moments, and prints what the runs ended with.

A child lasts a random share of what a whole run takes, so that its kill falls into reading, training, evaluating,
saving or the last write of the adapter.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch

from smolora.config import ExperimentConfig, resolve_config
from smolora.recipes.finetune import finetune
from smolora.records.run_dir import RunDir
from smolora.records.staging import hash_folder
from tests.integration.killing import end_under_kills

STEPS = 10


def settings(base: Path, rows: Path) -> ExperimentConfig:
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


def describe_end(run: RunDir) -> dict[str, object]:
    """Return what a run leaves: the adapter, the last state and the curve."""
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    curve = [(line["step"], line.get("loss"), line.get("eval_loss")) for line in lines]
    state = json.loads((run.checkpoint_path(STEPS) / "state.json").read_text())["trainer"]
    files = sorted(path.name for path in run.path.iterdir())
    return {"adapter": hash_folder(run.adapter), "best": state["best_step"], "curve": curve, "files": files}


def main(base: Path, rows: Path, folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    config, shares = settings(base, rows), random.Random(seed)

    def tune(run: RunDir) -> None:
        finetune(config, run.path, resume=True)

    found = end_under_kills(tune, describe_end, folder, kills=kills, draw_share=lambda: shares.uniform(0.2, 0.9))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), int(sys.argv[4]), int(sys.argv[5]))
