"""Random numbers depend on seed and purpose alone."""

from __future__ import annotations

import torch

from smolora.runtime.seeding import derive_seed, permutation, seed_noise


def test_a_seed_is_the_same_everywhere():
    assert derive_seed(0, "order", 1) == 4374215849138048446


def test_purposes_have_seeds_of_their_own():
    seeds = {derive_seed(seed, purpose, step) for seed in (0, 1) for purpose in ("a", "b") for step in range(5)}
    assert len(seeds) == 20


def test_a_permutation_holds_every_row_once():
    order = permutation(100, 3, "order", 0)
    assert sorted(order) == list(range(100))
    assert list(order) == list(permutation(100, 3, "order", 0))


def test_noise_does_not_depend_on_what_was_drawn_before():
    seed_noise(1, "noise", 5)
    first = torch.rand(3)
    torch.rand(7)
    seed_noise(1, "noise", 5)
    assert torch.equal(torch.rand(3), first)
