"""Trains in children that are killed at random moments, and prints what the runs ended with."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import torch

from smolora.adapters.attach import attach_adapter
from smolora.config import LoRAConfig, TrainingConfig
from smolora.data.collate import collate_packed
from smolora.data.token_dataset import TokenDataset, build_example
from smolora.models.loading import load_model
from smolora.records.run_dir import RunDir
from smolora.records.staging import hash_file
from smolora.training.checkpoint import RunIdentity
from smolora.training.trainer import Trainer
from tests.integration.killing import end_under_kills

STEPS = 30


def train(base: Path, run: RunDir) -> None:
    """Continue the run to its end: dropout on, a checkpoint each step, partial last groups, held-out rows."""
    bundle = attach_adapter(load_model(base, dtype=torch.float32), LoRAConfig(r=2, lora_dropout=0.2), seed=1)
    source = np.random.default_rng(0)
    rows = [source.integers(3, 60, size=int(length)).tolist() for length in source.integers(4, 12, size=11)]
    dataset = TokenDataset([build_example(row, [(2, len(row))]) for row in rows])
    config = TrainingConfig(
        learning_rate=1e-2, max_steps=STEPS, per_device_train_batch_size=4, save_steps=1, eval_steps=7, logging_steps=1
    )
    identity = RunIdentity(bundle.fingerprint, "t", dataset.fingerprint)
    trainer = Trainer(
        bundle, dataset, config, collate=collate_packed, eval_dataset=dataset, run_dir=run, identity=identity
    )
    with run.locked():
        run.sweep_leftovers()
        trainer.train(resume=True)


def describe_end(run: RunDir) -> dict[str, object]:
    """Return the last checkpoint's hashes and the losses of the whole curve."""
    last = run.checkpoint_path(STEPS)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    curve = [(line["step"], line.get("loss"), line.get("eval_loss")) for line in lines]
    hashes = {name: hash_file(last / name) for name in ("adapter_model.safetensors", "optim.safetensors", "state.json")}
    return {"hashes": hashes, "curve": curve}


def main(base: Path, folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    shares = random.Random(seed)
    found = end_under_kills(
        lambda run: train(base, run), describe_end, folder, kills=kills, draw_share=lambda: shares.uniform(0.0, 0.5)
    )
    leftovers = [path.name for path in folder.glob("run-*/.tmp-*")]
    print(json.dumps({**found, "leftovers": leftovers}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
