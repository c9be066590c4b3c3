"""Fused operations equal plain torch, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from smolora.models.fused_ops import Dropped, gate, gate_backward, rms_norm


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


@pytest.mark.parametrize("probability", [0.001, 0.05, 0.2, 0.5, 0.9])
def test_every_number_is_dropped_as_often_as_asked_and_apart_from_its_neighbour(probability):
    torch.manual_seed(0)
    dropped = torch.stack(
        [1 - Dropped.draw(torch.empty(13, 11), probability).zero_(torch.ones(13, 11)) for _ in range(3000)]
    )
    for found, share in ((dropped, probability), (dropped[..., 1:] * dropped[..., :-1], probability**2)):
        error = (share * (1 - share) / 3000) ** 0.5
        assert (found.mean(dim=0) - share).abs().max() < 6 * error + 2 / 3000  # 6 standard errors, and two of a kind.
        assert found.mean().item() == pytest.approx(share, abs=4 * error / 100**0.5)


def test_a_probability_may_be_tiny():
    torch.manual_seed(0)
    assert len(Dropped.draw(torch.empty(10_000), 1e-15).places) == 0


def test_a_mask_says_what_is_dropped_too():
    dropped = Dropped(torch.tensor([[True, False, False], [False, False, True]]))
    assert torch.equal(dropped.zero_(torch.ones(2, 3)), torch.tensor([[0.0, 1, 1], [1, 1, 0]]))


@pytest.mark.gpu
def test_a_device_draws_as_many():
    x = torch.ones(1000, 1000, device="cuda")
    torch.manual_seed(0)
    assert Dropped.draw(x, 0.05).zero_(x).mean().item() == pytest.approx(0.95, abs=1e-3)


def test_what_is_dropped_comes_from_torchs_generator():
    places = []
    for _ in range(2):
        torch.manual_seed(5)
        places.append(Dropped.draw(torch.empty(100), 0.3).places)
    assert torch.equal(*places)
