"""What may be sharded, and a pass for company. Sharded runs are in tests/integration/test_distributed.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from smolora.adapters.attach import attach_adapter
from smolora.config import LoRAConfig
from smolora.config.adapter import FullConfig
from smolora.data.collate import collate_packed
from smolora.data.token_dataset import build_example
from smolora.errors import ConfigError
from smolora.training.loss import sum_cross_entropy, target_logits_of
from smolora.training.processes import Processes
from smolora.training.sharding import keep_company, require_shardable, sharded_base
from tests.tiny import tiny_bundle

SHARDING = Processes(0, 2, is_sharding=True)


def test_a_frozen_base_may_be_sharded(tmp_path):
    require_shardable(attach_adapter(tiny_bundle("llama", tmp_path), LoRAConfig(), seed=0), SHARDING)


def test_a_model_that_is_trained_as_a_whole_is_refused(tmp_path):
    bundle = attach_adapter(tiny_bundle("llama", tmp_path), FullConfig(), seed=0)
    with pytest.raises(ConfigError, match="Train an adapter"):
        require_shardable(bundle, SHARDING)


def test_a_quantised_base_is_refused(tmp_path):
    bundle = replace(attach_adapter(tiny_bundle("llama", tmp_path), LoRAConfig(), seed=0), quantization="4bit")
    with pytest.raises(ConfigError, match="can't shard a base in 4bit"):
        require_shardable(bundle, SHARDING)


def test_processes_that_do_not_shard_leave_the_model_as_it_is(tmp_path):
    bundle = attach_adapter(tiny_bundle("llama", tmp_path), LoRAConfig(), seed=0)
    before = {name: id(parameter) for name, parameter in bundle.model.named_parameters()}
    with sharded_base(bundle, [], Processes()):
        assert {name: id(parameter) for name, parameter in bundle.model.named_parameters()} == before


def test_a_pass_for_company_counts_nothing_and_moves_nothing(tmp_path):
    bundle = attach_adapter(tiny_bundle("llama", tmp_path), LoRAConfig(), seed=0)
    batch = keep_company(collate_packed([build_example([1, 2, 3, 4], [(2, 4)])]))
    loss = sum_cross_entropy(target_logits_of(bundle.model)(bundle.model, batch), batch.targets)
    loss.backward()
    assert (len(batch.targets), batch.num_input_tokens, loss.item()) == (0, 0, 0.0)
    gradients = [p.grad for p in bundle.model.parameters() if p.requires_grad]
    assert gradients
    assert not any(gradient.any() for gradient in gradients)
