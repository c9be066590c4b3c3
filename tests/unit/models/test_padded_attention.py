"""Attention by plain products is torch's, over padded rows of encoders, decoders and both."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoModelForSeq2SeqLM

from smolora.models.padded_attention import is_faster_by_products, padded_attention
from tests.tiny import save_tiny_encoder, tiny_model

LENGTHS = (9, 4, 7)
"""Tokens of the rows; the rest of each is padding."""
WIDTH = max(LENGTHS)


@pytest.fixture
def build(tmp_path):
    """Return a function that makes a tiny model."""

    def make(family, dtype):
        opener = {"bert": AutoModel, "t5": AutoModelForSeq2SeqLM, "bart": AutoModelForSeq2SeqLM}.get(family)
        model = opener.from_pretrained(save_tiny_encoder(family, tmp_path)) if opener else tiny_model(family)
        return model.to(dtype).eval()

    return make


def run(model, width=WIDTH):
    """Return what the model makes of the rows' own tokens, and the gradients of its weights."""
    ids = torch.randint(3, 90, (len(LENGTHS), width), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(width) < torch.tensor(LENGTHS)[:, None]).long()
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    output = model(input_ids=ids, attention_mask=mask, **inputs)
    logits = output["logits"] if "logits" in output else output["last_hidden_state"]
    own = logits if logits.ndim == 2 else logits[mask.bool()]
    model.zero_grad()
    own.float().square().mean().backward()
    return own.detach(), [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "afmoe", "bert", "t5", "bart"])
def test_logits_and_gradients_are_those_of_torch_s_kernel(build, family):
    model = build(family, torch.float32)
    logits, gradients = run(model)
    with padded_attention(model):
        found, found_gradients = run(model)
    assert not torch.equal(found, logits), "something else computed it"
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found_gradients, gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_in_bfloat16_it_is_as_near_to_float32_as_torch_s_kernel(build, family):
    exact = run(build(family, torch.float32))[0]
    model = build(family, torch.bfloat16)
    errors = [(run(model)[0].float() - exact).norm()]
    with padded_attention(model):
        errors.append((run(model)[0].float() - exact).norm())
    assert errors[1] < 1.5 * errors[0]


def test_long_rows_are_left_to_torch_s_kernel():
    model = tiny_model("llama", max_position_embeddings=512).eval()
    with padded_attention(model):
        found = run(model, width=300)[0]
    assert torch.equal(found, run(model, width=300)[0])


def test_it_is_for_16_bits_and_gives_the_model_back(build):
    model = build("t5", torch.bfloat16)
    assert is_faster_by_products(model) and not is_faster_by_products(build("t5", torch.float32))
    before = run(model)[0]
    with padded_attention(model):
        assert not is_faster_by_products(model)
    assert torch.equal(run(model)[0], before)
