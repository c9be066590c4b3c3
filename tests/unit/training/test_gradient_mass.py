"""The gradient that a probe reads is that of the full weight on A's directions, and reading it changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from smolora.adapters.attach import attach_adapter
from smolora.adapters.tensor_places import find_lora_pairs
from smolora.config import LoRAConfig, TrainingConfig
from smolora.data.collate import collate_packed
from smolora.data.encoding import build_example
from smolora.data.token_dataset import TokenDataset
from smolora.errors import BrokenRunError, ConfigError
from smolora.training.gradient_mass import find_directions, measure_gradient_mass
from smolora.training.loss import sum_cross_entropy, target_logits_of
from smolora.training.plan import StepPlan
from tests.tiny import random_input_ids, tiny_bundle

PLAN = StepPlan(4, TrainingConfig(per_device_train_batch_size=2))


@pytest.fixture
def rows():
    ids = [random_input_ids(length, seed=length)[0].tolist() for length in (5, 9, 6, 8)]
    return TokenDataset([build_example(row, [(1, len(row))]) for row in ids])


@pytest.fixture
def bundle(tmp_path):
    return attach_adapter(tiny_bundle("llama", tmp_path), LoRAConfig(r=4, lora_alpha=12), seed=0)


def measure(bundle, rows, num_batches=2):
    return measure_gradient_mass(bundle, rows, PLAN, collate=collate_packed, num_batches=num_batches)


def full_gradients(bundle, rows, step):
    """Return dL/dW of every module of the plain model."""
    weights = {pair.module: pair.weight for pair in find_lora_pairs(bundle.model)}
    for weight in weights.values():
        weight.requires_grad_(True)
    batch = collate_packed([rows[int(row)] for row in np.concatenate(PLAN.micro_batches(step))])
    loss = sum_cross_entropy(target_logits_of(bundle.model)(bundle.model, batch), batch.targets) / len(batch.targets)
    gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
    for weight in weights.values():
        weight.requires_grad_(False)
    return gradients


def test_the_mass_is_what_two_halves_share_of_the_full_gradient_on_the_directions_of_a(bundle, rows):
    found = {module.module: module for module in measure(bundle, rows).modules}
    even, odd = (full_gradients(bundle, rows, step) for step in (0, 1))
    for pair in find_lora_pairs(bundle.model):
        projected = [pair.scaling * half[pair.module] @ pair.a.detach().T for half in (even, odd)]
        expected = max(0.0, float((projected[0] * projected[1]).sum()))
        module = found[pair.module]
        # Two orders of summation in float32.
        assert module.mass == pytest.approx(expected, rel=1e-3, abs=1e-7)
        assert module.density == module.mass / (pair.a.numel() + pair.b.numel())
        assert len(module.spectrum) == len(pair.a)
        assert sum(module.spectrum) >= module.mass - 1e-7, "only directions without agreement are left out"


def test_measuring_leaves_every_module_in_its_mode(bundle, rows):
    bundle.model.train()
    measure(bundle, rows)
    assert all(module.training for module in bundle.model.modules())


def test_of_equal_halves_the_spectrum_is_that_of_the_gradient(bundle, rows):
    twice = TokenDataset([rows[0]] * 4)
    found = {module.module: module for module in measure(bundle, twice).modules}
    gradients = full_gradients(bundle, twice, 0)
    for pair in find_lora_pairs(bundle.model):
        projected = pair.scaling * gradients[pair.module] @ pair.a.detach().T
        squares = torch.linalg.svdvals(projected).square().tolist()
        assert found[pair.module].spectrum == pytest.approx(squares, rel=1e-3, abs=1e-7)


def test_noise_has_no_directions_and_a_signal_in_it_keeps_its_own():
    generator = torch.Generator().manual_seed(0)
    signal = torch.outer(torch.randn(64, generator=generator), torch.randn(32, generator=generator)) / 4
    halves = [torch.randn(64, 32, generator=generator) for _ in range(2)]
    noise = find_directions(*halves)
    found = find_directions(*(half + signal for half in halves))
    assert sum(noise) < 0.1 * sum(torch.linalg.svdvals(halves[0]).square()), "chance alone is nearly nothing"
    assert found[0] > 5 * max(found[1], 1.0)


def test_measuring_changes_no_tensor_and_leaves_no_gradient(bundle, rows):
    before = {name: tensor.clone() for name, tensor in bundle.model.named_parameters()}
    measure(bundle, rows)
    for name, tensor in bundle.model.named_parameters():
        assert torch.equal(tensor, before[name])
        assert tensor.grad is None


def test_one_batch_has_no_halves(bundle, rows):
    with pytest.raises(ConfigError, match="--batches: at least 2"):
        measure(bundle, rows, num_batches=1)


def test_equal_halves_agree_fully(bundle, rows):
    twice = TokenDataset([rows[0]] * 4)
    assert measure(bundle, twice).agreement == pytest.approx(1.0)


def test_without_any_direction_that_the_batches_share_nothing_is_proposed(bundle, rows):
    with torch.no_grad():
        bundle.model.get_output_embeddings().weight.zero_()  # So no gradient reaches a module.
    with pytest.raises(ConfigError, match="the gradients are noise everywhere"):
        measure(bundle, rows)


def test_gradients_that_are_not_finite_end_the_probe(bundle, rows):
    with torch.no_grad():
        next(iter(find_lora_pairs(bundle.model))).a.fill_(float("nan"))
    with pytest.raises(BrokenRunError, match="aren't finite before the first update"):
        measure(bundle, rows)
