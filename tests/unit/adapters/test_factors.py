"""Which tensors can't move yet: held to the gradients that a backward pass gives."""

from __future__ import annotations

import pytest
import torch

from smolora.adapters.attach import attach_adapter
from smolora.adapters.factors import find_waiting
from smolora.config.adapter import METHODS
from tests.tiny import random_input_ids, tiny_bundle


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "adalora", "ia3", "vera", "layernorm"])
def test_those_that_wait_are_exactly_those_with_a_zero_gradient(tmp_path, method):
    model = attach_adapter(tiny_bundle("llama", tmp_path), METHODS[method](), seed=0, total_steps=20).model
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    model(random_input_ids(9)).logits.log_softmax(-1)[..., 5].sum().backward()
    assert find_waiting(trained) == {name for name, parameter in trained.items() if not parameter.grad.any()}


def test_none_waits_once_all_factors_are_away_from_zero(tmp_path):
    model = attach_adapter(tiny_bundle("llama", tmp_path), METHODS["vera"](), seed=0).model
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1)
    assert not find_waiting(trained)
