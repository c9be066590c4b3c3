"""A run that is killed at random moments and resumed each time ends with the bits of a run that never stopped."""

from __future__ import annotations

import json
import os
import random

import numpy as np
import pytest
import torch

from smolora.adapters.attach import attach_adapter
from smolora.config import LoRAConfig, TrainingConfig
from smolora.data.collate import collate_packed
from smolora.data.token_dataset import TokenDataset, build_example
from smolora.models.loading import load_model
from smolora.records.staging import hash_file
from smolora.training.checkpoint import RunIdentity
from smolora.training.trainer import Trainer
from tests.integration.killing import end_under_kills
from tests.tiny import save_tiny_model

STEPS = 30


def train(base, run):
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


def describe_end(run):
    """Return the last checkpoint's hashes and the losses of the whole curve."""
    last = run.checkpoint_path(STEPS)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    curve = [(line["step"], line.get("loss"), line.get("eval_loss")) for line in lines]
    hashes = {name: hash_file(last / name) for name in ("adapter_model.safetensors", "optim.safetensors", "state.json")}
    return {"hashes": hashes, "curve": curve}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX processes")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_random_kills_lose_nothing_and_change_no_bit(tmp_path, kills):
    base, shares = save_tiny_model("llama", tmp_path / "base"), random.Random(0)
    found = end_under_kills(
        lambda run: train(base, run), describe_end, tmp_path, kills=kills, draw_share=lambda: shares.uniform(0.0, 0.5)
    )
    assert found["kills"] == kills
    assert all(end == found["reference"] for end in found["ends"])
    assert not list(tmp_path.glob("run-*/.tmp-*"))
