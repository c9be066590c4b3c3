from __future__ import annotations

import pytest
import torch

from smolora.models.rounding import allow_rounding, shifted_embeddings
from tests.tiny import random_input_ids, tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_of_an_embedding_moves_by_an_eps_inside_the_block_alone(dtype):
    model, ids = tiny_model("llama").to(dtype), random_input_ids(9)
    embeddings = model.get_input_embeddings()
    plain = embeddings(ids)
    with shifted_embeddings(model):
        shifted = embeddings(ids)
    moved = ((shifted - plain).float() / plain.float()).abs()
    eps = torch.finfo(dtype).eps
    assert eps / 2 <= moved.min() and moved.max() <= 2 * eps
    assert torch.equal(embeddings(ids), plain)


def test_a_model_that_magnifies_roundings_is_allowed_more_and_none_less_than_16_eps():
    expected, eps = torch.tensor([4.0, -2.0]), torch.finfo(torch.float32).eps
    assert allow_rounding(expected, expected, torch.float32) == 16 * 4 * eps
    assert allow_rounding(expected, expected + 0.5, torch.float32) == 4.0
