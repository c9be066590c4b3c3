"""Packed weights: the same numbers, for the block alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from smolora.generation import packed_linears as module
from smolora.generation.packed_linears import packed_linears
from smolora.runtime.device import has_native_bfloat16
from tests.tiny import random_input_ids, tiny_model


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_layers_compute_the_same(family, dtype):
    if dtype == torch.bfloat16 and not has_native_bfloat16(torch.device("cpu")):
        pytest.skip("this processor has no native bfloat16, and nothing is packed in it")
    model, ids = tiny_model(family).to(dtype), random_input_ids(9)
    with torch.no_grad():
        expected = model(ids).logits
        with packed_linears(model, num_rows=8):
            assert sum("forward" in vars(layer) for layer in model.modules()) >= 9
            found = model(ids).logits
    # Sums in another order: a few units in the last place of the largest logit.
    torch.testing.assert_close(found, expected, rtol=0, atol=8 * torch.finfo(dtype).eps * expected.abs().max().item())


def test_layers_are_their_own_again_after_an_error():
    model = tiny_model("llama")
    with pytest.raises(ZeroDivisionError), packed_linears(model, num_rows=8):
        raise ZeroDivisionError
    assert not any("forward" in vars(layer) for layer in model.modules())


def test_what_is_no_plain_linear_layer_is_left_alone():
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = nn.Sequential(Doubled(4, 4), nn.Linear(4, 4).half(), nn.LayerNorm(4))
    with packed_linears(model, num_rows=8):
        assert not any("forward" in vars(layer) for layer in model.modules())


def test_a_model_too_large_for_copies_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(module, "_MOST_BYTES", 10_000)
    model = tiny_model("llama")
    with packed_linears(model, num_rows=8):
        assert not any("forward" in vars(layer) for layer in model.modules())
