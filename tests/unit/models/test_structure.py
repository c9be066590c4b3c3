"""What a module computes, and how, can be changed for a while."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from smolora.models.structure import (
    find_configs,
    replaced_attention,
    replaced_forward,
    returns_product,
    without_dropout,
)
from tests.tiny import save_tiny_encoder


def test_a_replaced_forward_is_put_back_within_another_and_after_an_error():
    linear, x = nn.Linear(2, 2), torch.ones(1, 2)
    expected = linear(x)
    with replaced_forward(linear, lambda _: 1):
        with pytest.raises(ZeroDivisionError), replaced_forward(linear, lambda _: 2):
            assert linear(x) == 2
            raise ZeroDivisionError
        assert linear(x) == 1
    assert torch.equal(linear(x), expected)
    assert "forward" not in vars(linear)


@pytest.mark.parametrize("is_training", [True, False])
def test_dropout_is_off_inside_the_block_and_every_module_gets_its_own_mode_back_after_an_error(is_training):
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2))).train(is_training)
    model[1][0].train(not is_training)
    modes = [module.training for module in model.modules()]
    with pytest.raises(ZeroDivisionError), without_dropout(model):
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == modes


def test_every_copy_of_the_config_names_another_attention_inside_the_block_and_its_own_after_an_error(tmp_path):
    model = AutoModelForSeq2SeqLM.from_pretrained(save_tiny_encoder("t5", tmp_path))
    configs = [model.config, model.encoder.config, model.decoder.config]
    model.encoder.config._attn_implementation = "eager"
    before = [config._attn_implementation for config in configs]
    with (
        pytest.raises(ZeroDivisionError),
        replaced_attention(find_configs(model), "for_a_test", sdpa_attention_forward, eager_mask),
    ):
        assert {config._attn_implementation for config in configs} == {"for_a_test"}
        raise ZeroDivisionError
    assert [config._attn_implementation for config in configs] == before


class _Grouped(nn.Linear):
    def forward(self, x):
        return super().forward(x.reshape(-1, 2, self.in_features))


class _Drawing(nn.Linear):
    def forward(self, x):
        found = super().forward(x)
        return found + torch.randn_like(found) if self.training else found


def test_a_linear_layer_is_asked_what_it_returns_in_eval_mode_and_one_that_cannot_say_returns_none():
    layers = [kind(4, 3) for kind in (nn.Linear, _Drawing, _Grouped)]
    state = torch.random.get_rng_state()
    assert [returns_product(layer) for layer in layers] == [True, True, False]
    assert torch.equal(torch.random.get_rng_state(), state)
