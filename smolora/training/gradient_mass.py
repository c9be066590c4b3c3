"""Where a fine-tune would pull: the gradient of every adapted module over some batches, without a single update.

B is zero before the first update, so A's gradient is exactly zero, and B's is the gradient of the full weight projected
on A's random rows: dL/dB = scale * dL/dW A^T. By Johnson and Lindenstrauss the projection keeps its length in
expectation, at the cost of a LoRA step and without a gradient as large as the weight. Ranks from gradients that are
accumulated before training are GoRA's idea (He et al. 2025, https://arxiv.org/abs/2502.12171).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from smolora.adapters.tensor_places import find_lora_pairs, locate_tensors
from smolora.data.collate import Batch
from smolora.data.token_dataset import Example, TokenDataset
from smolora.errors import BrokenRunError, ConfigError
from smolora.models.anatomy import Group
from smolora.models.bundle import ModelBundle
from smolora.models.structure import without_dropout
from smolora.training.loss import sum_cross_entropy, target_logits_of
from smolora.training.optim import trainable_parameters
from smolora.training.plan import StepPlan


@dataclass(frozen=True)
class ModuleMass:
    """The gradient of one module's adapter."""

    module: str
    """Path in the plain model."""
    group: Group
    layer: int | None
    mass: float
    """The squared norm of B's mean gradient, as far as two halves of the batches agree on it; at least 0."""
    parameters_per_rank: int
    """What one unit of rank costs: inputs and outputs."""
    largest_rank: int
    """The lesser of the two; a rank beyond it adds nothing."""
    density: float
    """Mass per parameter of the adapter, which no rank changes."""
    spectrum: tuple[float, ...]
    """The mass in each direction, the largest first: what one more unit of rank could hold. It sums up to the mass,
    but for directions on which the halves disagree, which count 0."""


@dataclass(frozen=True)
class GradientMass:
    """The gradients of all modules."""

    modules: tuple[ModuleMass, ...]
    agreement: float
    """Cosine between the mean gradients of the two halves of the batches: 1 is all signal, 0 is all noise."""
    loss: float
    """Over the batches, in nats a target token."""


def measure_gradient_mass(
    bundle: ModelBundle,
    rows: TokenDataset,
    plan: StepPlan,
    *,
    collate: Callable[[Sequence[Example]], Batch],
    num_batches: int,
) -> GradientMass:
    """Return the gradients of a fresh adapter over the batches that a run would see first; no weight changes.

    The mass of a module is the inner product of its mean gradients over the even and over the odd batches. Noise of the
    two is independent, so that in expectation nothing of it is in the product, however few the batches.

    Raises:
        ConfigError: Fewer than 2 batches, or halves that agree nowhere.
        BrokenRunError: Numbers that aren't finite.
    """
    if num_batches < 2:
        raise ConfigError(
            f"--batches: at least 2, as two halves are held against each other, found {num_batches}. Where the rows "
            "fill no more, add some, or take fewer for a batch (--batch-size)."
        )
    matrices = {name: tensor for name, tensor in trainable_parameters(bundle.model).items() if _is_b(name, bundle)}
    halves = [{name: torch.zeros_like(tensor) for name, tensor in matrices.items()} for _ in range(2)]
    losses = []
    with without_dropout(bundle.model):
        for step in range(num_batches):
            losses.append(_backward(bundle, rows, plan, step, collate))
            for name, tensor in matrices.items():
                halves[step % 2][name] += cast("Tensor", tensor.grad) / len(range(step % 2, num_batches, 2))
            bundle.model.zero_grad(set_to_none=True)
    even, odd = halves
    products, squares, other_squares = _multiply(even, odd), _multiply(even, even), _multiply(odd, odd)
    if not all(map(math.isfinite, (*losses, *products.values()))):
        raise BrokenRunError("loss or gradients aren't finite before the first update. Use model.dtype=float32.")
    spectra = {name: find_directions(even[name], odd[name]) for name in matrices}
    modules = _describe_modules(products, spectra, bundle)
    if not any(sum(module.spectrum) for module in modules):
        raise ConfigError(f"--batches: over {num_batches} batches the gradients are noise everywhere. Take more.")
    lengths = math.sqrt(math.fsum(squares.values()) * math.fsum(other_squares.values()))
    agreement = math.fsum(products.values()) / lengths
    return GradientMass(modules, agreement, sum(losses) / num_batches)


def _is_b(name: str, bundle: ModelBundle) -> bool:
    return locate_tensors([name], bundle.anatomy)[name].matrix == "B"


def _multiply(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float((first[name] * second[name]).sum(dtype=torch.float64)) for name in first}


def find_directions(first: Tensor, second: Tensor) -> tuple[float, ...]:
    """Return the mass by direction: eigenvalues of the product of two halves [out, rank], made symmetric.

    Noise has negative ones as large as its positive ones, so no more than what exceeds the most negative counts.
    """
    product = first.double().T @ second.double()
    found = torch.linalg.eigvalsh((product + product.T) / 2)
    return tuple(torch.where(found > -found[0], found, 0.0).clamp(min=0.0).flip(0).tolist())


def _describe_modules(
    products: Mapping[str, float], spectra: Mapping[str, tuple[float, ...]], bundle: ModelBundle
) -> tuple[ModuleMass, ...]:
    pairs = {pair.module: pair for pair in find_lora_pairs(bundle.model)}
    modules = []
    for name, place in locate_tensors(products, bundle.anatomy).items():
        (rank, width), height = pairs[place.module].a.shape, len(pairs[place.module].b)
        mass, cost = max(products[name], 0.0), width + height
        density = mass / (cost * rank)
        largest = min(width, height)
        spectrum = spectra[name] if mass else (0.0,) * rank  # What the halves don't share is noise in any direction.
        modules.append(ModuleMass(place.module, place.group, place.layer, mass, cost, largest, density, spectrum))
    return tuple(modules)


def _backward(
    bundle: ModelBundle,
    rows: TokenDataset,
    plan: StepPlan,
    step: int,
    collate: Callable[[Sequence[Example]], Batch],
) -> float:
    """Leave the gradient of one step's token mean in the model, and return that mean."""
    target_logits = target_logits_of(bundle.model, bundle.task)
    batches = [collate([rows[int(row)] for row in part]).to(bundle.device) for part in plan.micro_batches(step)]
    tokens = sum(batch.num_target_tokens for batch in batches)
    mean = 0.0
    for batch in batches:
        loss = sum_cross_entropy(target_logits(bundle.model, batch), batch.targets, weight=1 / tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        mean += loss.item()
    return mean
