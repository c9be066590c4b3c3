from __future__ import annotations

import pytest
import torch

from smolora.adapters.attach import attach_adapter
from smolora.adapters.state import fingerprint_adapter, restore_adapter
from smolora.config.adapter import LoRAConfig
from smolora.errors import ModelError
from smolora.models.loading import load_model
from tests.tiny import random_input_ids, tiny_bundle


def test_a_fresh_adapter_gets_the_saved_weights_and_stays_trainable(save_pair):
    base, adapter = save_pair()
    saved = attach_adapter(load_model(base), LoRAConfig(lora_dropout=0.0), seed=9)
    trained = {name for name, parameter in saved.model.named_parameters() if parameter.requires_grad}
    before = saved.model(random_input_ids(6)).logits
    restore_adapter(saved, adapter)
    assert not torch.allclose(saved.model(random_input_ids(6)).logits, before)
    assert {name for name, parameter in saved.model.named_parameters() if parameter.requires_grad} == trained


@pytest.mark.parametrize("other", [{"r": 4}, {"target_modules": "attention_only"}])
def test_an_adapter_of_another_shape_is_refused(save_pair, other):
    base, adapter = save_pair()
    with pytest.raises(ModelError, match="and this base takes|0 tensors are missing"):
        restore_adapter(attach_adapter(load_model(base), LoRAConfig(**other), seed=0), adapter)


def test_a_model_without_an_adapter_has_none_to_restore(save_pair, tmp_path):
    _, adapter = save_pair()
    with pytest.raises(ModelError, match="carries no adapter"):
        restore_adapter(tiny_bundle("llama", tmp_path / "other"), adapter)


def test_an_adapters_fingerprint_is_that_of_its_weights(tmp_path):
    base = tiny_bundle("llama", tmp_path / "base")
    assert fingerprint_adapter(base) is None
    adapted = attach_adapter(base, LoRAConfig(), seed=0)
    before = fingerprint_adapter(adapted)
    assert fingerprint_adapter(adapted) == before
    with torch.no_grad():
        next(parameter for parameter in adapted.model.parameters() if parameter.requires_grad)[0, 0] += 1
    assert fingerprint_adapter(adapted) != before
