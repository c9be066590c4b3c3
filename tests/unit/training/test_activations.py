"""Recomputing activations for a while, on the kinds of model that a run trains."""

from __future__ import annotations

import pytest

from smolora.adapters.attach import attach_adapter
from smolora.config import GPTConfig, LoRAConfig
from smolora.models.building import build_gpt
from smolora.training.activations import recomputed_activations
from tests.tiny import tiny_bundle, tiny_tokenizer


def adapted(folder):
    return attach_adapter(tiny_bundle("llama", folder), LoRAConfig(r=2), seed=0).model


def from_nothing(folder):
    shape = GPTConfig(num_layers=1, num_heads=2, width=16, context=32)
    return build_gpt(shape, tiny_tokenizer(), seed=0).model


@pytest.mark.parametrize("make", [adapted, from_nothing])
def test_activations_are_recomputed_inside_the_block_with_no_warning(make, tmp_path):
    model = make(tmp_path / "base")

    def switches():
        return {
            module.gradient_checkpointing for module in model.modules() if hasattr(module, "gradient_checkpointing")
        }

    with recomputed_activations(model):
        assert switches() == {True}
    assert switches() == {False}
