"""A random state of one's own."""

from __future__ import annotations

import pytest
import torch

from smolora.generation.random_state import own_random_state

CPU = torch.device("cpu")


def test_the_block_draws_from_its_seed():
    draws = []
    for _ in range(2):
        with own_random_state(CPU, 3):
            draws.append(torch.rand(4))
    assert torch.equal(*draws)


def test_the_outer_state_is_restored_even_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), own_random_state(CPU, None):
        torch.rand(3)
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
def test_the_state_of_an_accelerator_is_restored_too():
    device = torch.device("cuda", 0)
    before = torch.cuda.get_rng_state(device)
    with own_random_state(device, 3):
        torch.rand(4, device=device)
    assert torch.equal(torch.cuda.get_rng_state(device), before)
