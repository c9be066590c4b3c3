"""Linear layers by oneDNN equal torch's own, forward and backward, and are put back."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from smolora.config import GPTConfig
from smolora.models.gpt import GPTModel
from smolora.models.trained_linear import linears_by_onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def gradients(model, run):
    model.zero_grad()
    output = run(model)
    output.square().mean().backward()
    return output.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bias", [True, False])
def test_a_gpt_has_the_same_logits_and_gradients(bias):
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(num_layers=2, num_heads=2, width=32, context=16, vocab_size=40, bias=bias))
    ids = torch.randint(40, (3, 16))
    expected = gradients(model, lambda m: m(ids))
    with linears_by_onednn(model) as count:
        assert count == 2 * 6 + 1
        found = gradients(model, lambda m: m(ids))
    # float32 sums of at most 128 terms in another order.
    assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name in expected[1]:
        assert_close(found[1][name], expected[1][name], rtol=1e-4, atol=1e-6)
    assert not [module for module in model.modules() if "forward" in vars(module)]


def test_only_what_needs_a_gradient_gets_one():
    layer = nn.Linear(8, 4)
    layer.weight.requires_grad_(False)
    x = torch.randn(5, 8, requires_grad=True)
    with linears_by_onednn(layer):
        layer(x).sum().backward()
    assert layer.weight.grad is None
    assert_close(layer.bias.grad, torch.full((4,), 5.0))
    assert_close(x.grad, layer.weight.sum(0).expand(5, 8))


def test_other_types_and_layers_with_a_forward_of_their_own_stay_as_they_are():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Linear(4, 4).bfloat16(), Doubled(4, 4), nn.Linear(4, 4).double())
    with linears_by_onednn(model) as count:
        assert count == 0
