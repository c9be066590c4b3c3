"""How far an adapter moves the weights it is on: the norm of scaling * B A, held against the weight's own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from smolora.models.bundle import ModelBundle
from smolora.models.quantised import dequantise
from smolora.models.structure import is_quantised


@dataclass(frozen=True)
class Movement:
    """Frobenius norms of updates, relative to those of the weights they are added to."""

    relative: float
    """Of all adapted weights together."""
    modules: dict[str, float]
    """By the path of the module in the base."""

    @property
    def num_still(self) -> int:
        """Modules whose weight stays what it was."""
        return sum(moved == 0 for moved in self.modules.values())


@torch.no_grad()
def measure_movement(bundle: ModelBundle) -> Movement:
    """Return how far each adapted weight is from the base's; a bundle without an adapter moves nothing."""
    norms = {
        name.removeprefix("base_model.model."): (_norm_of_update(module), _norm_of_weight(module.get_base_layer()))
        for name, module in bundle.model.named_modules()
        if isinstance(module, LoraLayer)
    }
    moved, held = (math.hypot(*(pair[side] for pair in norms.values())) for side in (0, 1))
    return Movement(_divide(moved, held), {name: _divide(*pair) for name, pair in norms.items()})


def _norm_of_update(layer: LoraLayer) -> float:
    """Return the norm of scaling * B A by two products of rank size: |B A|^2 = sum(B^T B * A A^T)."""
    name = layer.active_adapters[0]
    a, b = (matrices[name].weight.double() for matrices in (layer.lora_A, layer.lora_B))
    squared = float(((b.T @ b) * (a @ a.T)).sum())
    scaling: float = layer.scaling[name]
    return abs(scaling) * math.sqrt(0.0 if squared < 0 else squared)  # Rounding may leave it below zero; a NaN stays.


def _norm_of_weight(base: nn.Module) -> float:
    weight: Tensor = dequantise(base, torch.float32) if is_quantised(base) else base.get_parameter("weight")
    return float(torch.linalg.vector_norm(weight, dtype=torch.float32))


def _divide(moved: float, held: float) -> float:
    return moved / held if held else moved
