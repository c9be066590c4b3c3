"""Twenty steps here and twenty in plain transformers + peft, on the same rows: the losses are the same numbers.

The peer pads on the right, runs the whole head, shifts the labels and averages over all targets of the step, as its
users do. Dropout is 0 in base and adapter, so nothing is drawn.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import peft
import pytest
import torch
from torch.testing import assert_close

from smolora.adapters.attach import attach_adapter
from smolora.adapters.fast_path import fast_path
from smolora.config import LoRAConfig, SpeedConfig, TrainingConfig
from smolora.data.collate import collate_packed, get_data_collator
from smolora.data.token_dataset import TokenDataset, build_example
from smolora.models.loading import load_model
from smolora.models.packing import can_pack_rows
from smolora.training.callback import Callback
from smolora.training.plan import StepPlan
from smolora.training.trainer import Trainer
from tests.tiny import save_tiny_model

STEPS, ROWS, LEARNING_RATE = 20, 8, 5e-3
PLAIN = SpeedConfig(row_attention=False, fused_lora=False, fused_blocks=False, packed_weights=False)


@pytest.fixture(scope="module")
def rows():
    random = np.random.default_rng(3)
    lengths = random.integers(6, 24, size=40)
    ids = [random.integers(3, 60, size=int(length)).tolist() for length in lengths]
    return TokenDataset([build_example(row, [(len(row) // 3, len(row))]) for row in ids])


def smolora_losses(folder, rows, *, accumulation, layout="packed", speed=PLAIN):
    class Losses(Callback):
        def __init__(self):
            self.found = []

        def on_step_end(self, trainer, record):
            self.found.append(record.loss)

    losses = Losses()
    bundle = attach_adapter(load_model(folder, dtype=torch.float32), LoRAConfig(lora_dropout=0.0), seed=7)
    config = training_config(accumulation)
    with fast_path(bundle, speed, is_packed=layout == "packed") as parts:
        assert bool(parts.used) == (speed != PLAIN)
        Trainer(bundle, rows, config, collate=get_data_collator(layout), callbacks=[losses]).train()
    return losses.found


def training_config(accumulation):
    return TrainingConfig(
        learning_rate=LEARNING_RATE,
        max_steps=STEPS,
        per_device_train_batch_size=ROWS // accumulation,
        gradient_accumulation_steps=accumulation,
        warmup_steps=0,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
    )


@pytest.fixture(scope="module")
def peer(rows, tmp_path_factory):
    """Return a function that gives a family's folder, and the losses of its plain run."""

    @cache
    def peer(family):
        folder = save_tiny_model(family, tmp_path_factory.mktemp(family) / "base")
        return folder, peer_losses(folder, rows)

    return peer


def peer_losses(folder, rows):
    """The same run written with nothing of smolora but the order of the rows and the adapter's first weights."""
    adapted = attach_adapter(load_model(folder, dtype=torch.float32), LoRAConfig(lora_dropout=0.0), seed=7).model
    assert isinstance(adapted, peft.PeftModel)
    adapted.train()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    plan, losses = StepPlan(len(rows), training_config(1)), []
    for step in range(STEPS):
        input_ids, mask, labels = pad([rows[int(row)] for row in np.concatenate(plan.micro_batches(step))])
        logits = adapted(input_ids=input_ids, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def pad(examples):
    width = max(map(len, examples))
    input_ids = torch.zeros(len(examples), width, dtype=torch.long)
    mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, -100)
    for index, example in enumerate(examples):
        length = len(example)
        input_ids[index, :length] = torch.from_numpy(example.input_ids)
        mask[index, :length] = 1
        labels[index, :length] = torch.from_numpy(np.where(example.is_target, example.input_ids, -100))
    return input_ids, mask, labels


@pytest.mark.parametrize(
    ("family", "accumulation"), [("llama", 1), ("llama", 4), ("gpt2", 1), ("gpt2", 4), ("qwen3", 1), ("gemma", 1)]
)
@pytest.mark.parametrize("speed", [PLAIN, SpeedConfig()], ids=["plain", "fast"])
def test_losses_equal_plain_transformers_and_peft_step_by_step(peer, rows, family, accumulation, speed):
    folder, expected = peer(family)
    found = smolora_losses(folder, rows, accumulation=accumulation, speed=speed)
    assert_close(found, expected, rtol=0, atol=1e-5)
    assert found[-1] < found[0] - 0.1


@pytest.mark.parametrize("family", ["bloom", "opt"])
def test_a_family_that_leaks_between_packed_rows_is_noticed_and_padded_batches_are_exact(peer, rows, family):
    folder, expected = peer(family)
    packable, reason = can_pack_rows(load_model(folder, dtype=torch.float32).model)
    assert not packable
    assert "attention can't keep rows apart" in reason
    found = smolora_losses(folder, rows, accumulation=1, layout="padded")
    assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_packed_batch_of_these_rows_holds_no_padding(rows):
    batch = collate_packed([rows[0], rows[1]])
    assert batch.input_ids.shape == (1, len(rows[0]) + len(rows[1]))
