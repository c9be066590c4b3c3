"""Trains in forked children and kills them at random moments, until the run is done; then prints what it ended with.

Forked after the heavy imports, a cycle costs about a tenth of a second; a fresh interpreter each time would cost 5.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
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

STEPS = 60


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


def train_in_child(base: Path, run: RunDir) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train(base, run)
            code = 0
        finally:
            os._exit(code)
    return child


def describe_end(run: RunDir) -> dict[str, object]:
    """Return the last checkpoint's hashes and the losses of the whole curve."""
    last = run.checkpoint_path(STEPS)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    curve = [(line["step"], line.get("loss"), line.get("eval_loss")) for line in lines]
    hashes = {name: hash_file(last / name) for name in ("adapter_model.safetensors", "optim.safetensors", "state.json")}
    return {"hashes": hashes, "curve": curve}


def main(base: Path, folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    delays = random.Random(seed)
    reference = RunDir(folder / "reference")
    started = time.perf_counter()
    assert os.waitpid(train_in_child(base, reference), 0)[1] == 0
    longest = time.perf_counter() - started
    done, killed = [], 0
    while killed < kills or not done:
        run = RunDir(folder / f"run-{len(done)}")
        while True:
            child = train_in_child(base, run)
            if killed < kills:
                time.sleep(delays.uniform(0.0, longest / 2))
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            killed += os.WIFSIGNALED(status)
            if not os.WIFSIGNALED(status):
                assert status == 0, f"a resumed run failed with status {status}"
                break
        done.append(describe_end(run))
    leftovers = [path.name for path in folder.glob("run-*/.tmp-*")]
    print(json.dumps({"kills": killed, "reference": describe_end(reference), "ends": done, "leftovers": leftovers}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
