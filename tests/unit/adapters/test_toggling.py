from __future__ import annotations

import pytest
import torch

from smolora.adapters.toggling import disabled_adapter
from tests.tiny import random_input_ids, tiny_bundle
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
