from __future__ import annotations

import math

import peft
import pytest
import torch

from smolora.adapters.adapter_files import read_adapter
from smolora.adapters.changes import find_changes
from smolora.adapters.plain_lora import is_plain_lora, read_plain_lora, read_scaling
from smolora.adapters.store import load_adapter
from smolora.models.loading import load_model
from tests.tiny import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_from_files_and_shapes_is_what_peft_s_layers_hold(save_peft_pair, family):
    base, folder = save_peft_pair(family, target_modules="all-linear", r=4, use_rslora=True)
    adapter = read_adapter(folder)
    assert is_plain_lora(adapter)
    found = read_plain_lora(adapter, load_model(base, device="meta"))
    expected = find_changes(load_adapter(load_model(base), folder).model)
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        assert torch.equal(found[name].a, change.a)
        assert torch.equal(found[name].b, change.b)
        assert found[name].scaling == pytest.approx(change.scaling)


def test_the_scaling_of_a_module_is_peft_s():
    config = peft.LoraConfig(r=4, lora_alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3})
    assert read_scaling(config, "model.layers.0.self_attn.q_proj") == 1.5
    assert read_scaling(config, "model.layers.0.self_attn.k_proj") == 2
    assert read_scaling(config, "model.layers.0.self_attn.xq_proj") == 2
    config.use_rslora = True
    assert read_scaling(config, "model.layers.0.self_attn.k_proj") == pytest.approx(8 / math.sqrt(4))


def test_dora_and_whole_modules_are_more_than_plain_lora(save_peft_pair):
    _, folder = save_peft_pair(target_modules=["q_proj"], use_dora=True)
    assert not is_plain_lora(read_adapter(folder))
