"""Fused operations equal plain torch, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from smolora.models.fused_ops import draw_keep_mask, gate, gate_backward, rms_norm


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_the_gate_and_its_gradient_are_the_plain_ones(activation):
    plain = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[activation]
    x = draw(7, 12).requires_grad_()
    grad = draw(7, 6, seed=1)
    expected = plain(x[:, :6]) * x[:, 6:]
    assert_close(gate(x.detach(), activation), expected)
    gradient, again = gate_backward(grad, x.detach(), activation)
    assert_close(gradient, torch.autograd.grad(expected, x, grad)[0])
    assert torch.equal(again, gate(x.detach(), activation))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16)])
def test_the_norm_and_its_gradient_are_the_plain_ones(offset, shape):
    x, weight = draw(*shape, dtype=torch.float32).requires_grad_(), draw(16, dtype=torch.float32, seed=1)
    grad = draw(*shape, dtype=torch.float32, seed=2)
    found = rms_norm(x, weight, eps=1e-6, offset=offset)
    expected = F.rms_norm(x, (16,), weight + offset, eps=1e-6)
    assert_close(found, expected)
    assert_close(torch.autograd.grad(found, x, grad)[0], torch.autograd.grad(expected, x, grad)[0])


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.9])
def test_a_mask_keeps_its_share_of_every_element(probability):
    torch.manual_seed(0)
    masks = torch.stack([draw_keep_mask(torch.empty(13, 11), probability) for _ in range(3000)]).float()
    # 3,000 draws: 6 standard errors.
    error = (probability * (1 - probability) / 3000) ** 0.5
    assert (masks.mean(dim=0) - (1 - probability)).abs().max() < 6 * error


def test_masks_come_from_torchs_generator():
    masks = []
    for _ in range(2):
        torch.manual_seed(5)
        masks.append(draw_keep_mask(torch.empty(100), 0.3))
    assert torch.equal(*masks)
