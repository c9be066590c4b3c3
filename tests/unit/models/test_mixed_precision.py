"""Mixed precision computes what float32 does, up to bfloat16's rounding; weights and gradients stay float32."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from smolora.config import GPTConfig
from smolora.models.gpt import GPTModel
from smolora.models.mixed_precision import mixed_precision

TOKENS = 48


def build(**settings):
    torch.manual_seed(0)
    shape = {"num_layers": 2, "num_heads": 2, "width": 32, "context": TOKENS, "vocab_size": 40, **settings}
    model = GPTModel(GPTConfig(**shape))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def learn(model, **inputs):
    """Return the loss and every gradient, as one vector."""
    ids = torch.randint(40, (5, TOKENS + 1), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    logits = model(ids[:, :-1], **inputs)
    loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    return logits.detach(), loss.item(), torch.cat([gradient.flatten() for gradient in gradients])


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradients_are_those_of_float32_up_to_what_plain_autocast_loses(bias, packed):
    model = build(bias=bias)
    inputs = {"position_ids": torch.arange(TOKENS).remainder(20).expand(5, -1)} if packed else {}
    expected = learn(model, **inputs)
    with torch.autocast("cpu", torch.bfloat16):
        plain = learn(copy.deepcopy(model), **inputs)
    with mixed_precision(model):
        found = learn(model, **inputs)
    assert found[0].dtype == torch.bfloat16
    assert abs(found[1] - expected[1]) < 2e-3  # Of ln(40) = 3.7: bfloat16 keeps 8 bits of every logit.
    lost = distance(plain[2], expected[2])
    assert 0 < distance(found[2], expected[2]) < 1.5 * lost < 0.05


def test_it_is_put_back_and_weights_stay_as_they_are():
    model = build()
    before = copy.deepcopy(model.state_dict())
    expected = learn(model)
    with mixed_precision(model):
        assert learn(model)[1] != expected[1]
    assert learn(model)[1] == expected[1]
    assert not [module for module in model.modules() if "forward" in vars(module)]
    for name, weight in model.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, before[name])


def test_recomputed_activations_have_the_same_gradient():
    model = build().train()
    with mixed_precision(model):
        expected = learn(model)
        model.gradient_checkpointing_enable()
        found = learn(model)
    assert found[1] == expected[1]
    assert torch.equal(found[2], expected[2])


def test_dropout_falls_on_the_weights_of_attention_and_on_what_comes_after_it_in_training_alone():
    model, mixed, outputs = build(dropout=0.5, num_layers=1), [], []
    attention = model.blocks[0].attention
    attention.W_o.register_forward_pre_hook(lambda module, args: mixed.append(args[0]))
    attention.dropout.register_forward_hook(lambda module, args, output: outputs.append(output))
    x = torch.randn(5, TOKENS, 32)
    with mixed_precision(model), torch.no_grad():
        for is_training in (True, True, False, False):
            model.train(is_training)
            attention(x)
    assert not torch.equal(mixed[0], mixed[1])
    assert torch.equal(mixed[2], mixed[3])
    assert [0.4 < output.eq(0).float().mean() < 0.6 for output in outputs] == [True, True, False, False]
