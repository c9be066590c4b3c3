"""A GPT of a few thousand weights over the letters of one sentence, and what a Trainer needs around it."""

from __future__ import annotations

import numpy as np
import pytest

from smolora.config import GPTConfig, TrainingConfig
from smolora.data.collate import collate_packed
from smolora.data.token_dataset import TokenDataset, build_example
from smolora.models.building import build_gpt
from smolora.records.run_dir import RunDir
from smolora.tokenizers.char import CharTokenizer
from smolora.tokenizers.pretrained import to_pretrained
from smolora.training.checkpoint import RunIdentity
from smolora.training.trainer import Trainer

IDENTITY = RunIdentity(base="b", tokenizer="t", data="d")


@pytest.fixture(scope="session")
def tokenizer():
    return to_pretrained(CharTokenizer.train("the quick brown fox"), 32)


@pytest.fixture
def dataset():
    """Twelve rows of uneven lengths, of which the second half is trained on."""
    random = np.random.default_rng(0)
    rows = [random.integers(40, 90, size=int(length)).tolist() for length in random.integers(4, 20, size=12)]
    return TokenDataset([build_example(row, [(len(row) // 2, len(row))]) for row in rows])


@pytest.fixture
def make_trainer(tokenizer, dataset):
    """Return a function that builds a Trainer on a fresh, equally seeded GPT."""

    def make(
        *, collate=collate_packed, dropout=0.0, rows=dataset, eval_dataset=None, run_dir=None, callbacks=(), **settings
    ):
        shape = GPTConfig(num_layers=2, num_heads=2, width=16, context=32, dropout=dropout, bias=True)
        defaults = {"learning_rate": 1e-2, "max_steps": 6, "per_device_train_batch_size": 4, "save_steps": 1}
        return Trainer(
            build_gpt(shape, tokenizer, seed=0),
            rows,
            TrainingConfig(**{**defaults, **settings}),
            collate=collate,
            eval_dataset=eval_dataset,
            run_dir=run_dir,
            identity=IDENTITY,
            callbacks=callbacks,
        )

    return make


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    return run
