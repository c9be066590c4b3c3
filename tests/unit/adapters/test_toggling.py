from __future__ import annotations

import peft
import pytest
import torch

from smolora.adapters.attach import attach_adapter
from smolora.adapters.toggling import disabled_adapter, refuse_inseparable
from smolora.config.adapter import METHODS
from smolora.errors import ModelError
from smolora.models.loading import load_model
from tests.tiny import random_input_ids, save_tiny_encoder, save_tiny_model, tiny_bundle
from tests.unit.adapters.conftest import attach_moved


def test_inside_the_block_the_base_answers_and_after_it_the_adapter(tmp_path):
    bundle, ids = tiny_bundle("llama", tmp_path), random_input_ids(8)
    base = bundle.model(ids).logits
    adapted = attach_moved(bundle)
    before = adapted.model(ids).logits
    with disabled_adapter(adapted):
        assert torch.equal(adapted.model(ids).logits, base)
    assert torch.equal(adapted.model(ids).logits, before)
    assert not torch.equal(before, base)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_behind_virtual_tokens_a_head_is_switched_off_too(tmp_path, family, method):
    save = save_tiny_encoder if family == "bert" else save_tiny_model
    base = load_model(save(family, tmp_path), task="classification", labels=("no", "yes"))
    ids, mask = random_input_ids(8), torch.ones(1, 8, dtype=torch.long)
    plain = base.model(ids, attention_mask=mask).logits
    adapted = attach_adapter(base, METHODS[method](num_virtual_tokens=2), seed=0)
    with torch.no_grad():
        for parameter in adapted.model.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    adapted.model.eval()
    before = adapted.model(ids, attention_mask=mask).logits
    with disabled_adapter(adapted):
        assert torch.equal(adapted.model(ids, attention_mask=mask).logits, plain)
    assert torch.equal(adapted.model(ids, attention_mask=mask).logits, before)
    assert not torch.equal(before, plain)


@pytest.mark.parametrize("config", [peft.LoraConfig(bias="lora_only"), peft.VeraConfig(bias="all")])
def test_an_adapter_that_replaces_biases_of_the_base_can_not_be_switched_off(config):
    with pytest.raises(ModelError, match=f"an adapter with bias='{config.bias}' changes the base itself"):
        refuse_inseparable(config)


def test_what_was_frozen_stays_frozen(tmp_path):
    adapted = attach_moved(tiny_bundle("llama", tmp_path))
    frozen = {name for name, _ in adapted.model.named_parameters() if ".mlp." in name or ".lora_" not in name}
    for name, parameter in adapted.model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    with pytest.raises(KeyError), disabled_adapter(adapted):
        raise KeyError
    assert {name for name, parameter in adapted.model.named_parameters() if not parameter.requires_grad} == frozen


def test_a_bundle_without_an_adapter_is_left_as_it_is(tmp_path):
    bundle, ids = tiny_bundle("llama", tmp_path), random_input_ids(8)
    with disabled_adapter(bundle):
        assert bundle.model(ids).logits.isfinite().all()
