from __future__ import annotations

import pytest
import torch

from smolora.config.model import GPTConfig
from smolora.errors import ConfigError
from smolora.models.building import build_gpt
from tests.tiny import tiny_tokenizer

SHAPE = GPTConfig(num_layers=1, num_heads=2, width=8, context=16, bias=True)


def test_the_vocabulary_is_the_tokenizer_s_unless_a_larger_one_is_asked_for():
    tokenizer = tiny_tokenizer()
    assert build_gpt(SHAPE, tokenizer, seed=0).model.lm_head.weight.shape[0] == len(tokenizer)
    assert build_gpt(SHAPE.replace(vocab_size=320), tokenizer, seed=0).model.lm_head.weight.shape[0] == 320
    with pytest.raises(ConfigError, match="287 is below the tokenizer's 288 tokens"):
        build_gpt(SHAPE.replace(vocab_size=287), tokenizer, seed=0)


def test_the_weights_are_the_seed_s_and_the_global_generator_is_left_alone():
    drawn = []
    for seed, noise in ((7, 1), (7, 2), (8, 1)):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        drawn.append(build_gpt(SHAPE, tiny_tokenizer(), seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
    weights = [bundle.model.token_embedding.weight for bundle in drawn]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert drawn[0].fingerprint == drawn[1].fingerprint != drawn[2].fingerprint
