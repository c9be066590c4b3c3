"""What an adapter makes of the base's own parameters, read from peft's layers: for merging, and to measure movement.

Weights are [out, in] here, as linear layers hold them, however a family stores them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import peft
import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.ia3.layer import IA3Layer
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.vera.layer import VeraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from smolora.models.anatomy import PEFT_PREFIX
from smolora.models.structure import read_bias

_ADALORA_EPS = 1e-5
"""peft divides AdaLoRA's scale by the rank and this."""


class Change(Protocol):
    """What becomes of one parameter."""

    def apply(self, weight: Tensor) -> Tensor:
        """Return the changed parameter in float32; `weight` may be of 16 bits."""

    def measure(self, weight: Tensor) -> float:
        """Return the norm of the difference that `apply` makes."""


@dataclass(frozen=True)
class LowRank:
    """W + scaling * B A."""

    a: Tensor
    """[r, in]"""
    b: Tensor
    """[out, r]"""
    scaling: float

    def apply(self, weight: Tensor) -> Tensor:
        return weight.to(torch.float32, copy=True).addmm_(self.scaling * self.b.float(), self.a.float())

    def measure(self, weight: Tensor) -> float:
        """By two products of rank size: |B A|^2 = sum(B^T B * A A^T)."""
        a, b = self.a.double(), self.b.double()
        squared = float(((b.T @ b) * (a @ a.T)).sum())
        return abs(self.scaling) * math.sqrt(0.0 if squared < 0 else squared)  # Rounding may leave it below zero.


@dataclass(frozen=True)
class Directed:
    """DoRA: the rows of W + scaling * B A, each brought to a trained length."""

    low_rank: LowRank
    lengths: Tensor
    """[out]"""

    def apply(self, weight: Tensor) -> Tensor:
        moved = self.low_rank.apply(weight)
        return moved.mul_((self.lengths.float() / torch.linalg.vector_norm(moved, dim=1))[:, None])

    def measure(self, weight: Tensor) -> float:
        return _distance(self.apply(weight), weight)


@dataclass(frozen=True)
class Rescaled:
    """IA3: W times a factor for each row or column; a bias times that of its row."""

    factors: Tensor
    """[out, 1], [1, in], or [out] for a bias."""

    def apply(self, weight: Tensor) -> Tensor:
        return weight.float() * self.factors.float()

    def measure(self, weight: Tensor) -> float:
        return _distance(self.apply(weight), weight)


@dataclass(frozen=True)
class Replaced:
    """A parameter of which the adapter holds its own version."""

    value: Tensor

    def apply(self, weight: Tensor) -> Tensor:
        return self.value.float()

    def measure(self, weight: Tensor) -> float:
        return _distance(self.value, weight)


@torch.no_grad()
def find_changes(model: nn.Module, adapter: str = "default") -> dict[str, Change]:
    """Return what an adapter changes, by the parameter's name in the plain model; soft prompts change a head alone."""
    prefix = "base_model." if is_soft_prompt(model) else PEFT_PREFIX  # peft puts nothing around a base behind them.
    return {
        f"{path.removeprefix(prefix)}.{name}": change
        for path, layer in model.named_modules()
        for name, change in _iter_changes(layer, adapter)
    }


def _iter_changes(layer: nn.Module, adapter: str) -> Iterator[tuple[str, Change]]:
    if isinstance(layer, AdaLoraLayer):
        scale = float(layer.scaling[adapter] / (layer.ranknum[adapter] + _ADALORA_EPS))
        yield "weight", LowRank(layer.lora_A[adapter] * layer.lora_E[adapter], layer.lora_B[adapter], scale)
    elif isinstance(layer, LoraLayer):
        yield "weight", _read_lora(layer, adapter)
    elif isinstance(layer, VeraLayer):
        yield "weight", _read_vera(layer, adapter)
    elif isinstance(layer, IA3Layer):
        factors = layer.ia3_l[adapter]
        yield "weight", Rescaled(factors)
        if not layer.is_feedforward and read_bias(layer.get_base_layer()) is not None:
            yield "bias", Rescaled(factors.flatten())
    elif isinstance(layer, LNTuningLayer):
        yield from _replace(layer.ln_tuning_layers[adapter])
    elif isinstance(layer, ModulesToSaveWrapper):
        yield from _replace(layer.modules_to_save[adapter])


def _read_lora(layer: LoraLayer, adapter: str) -> Change:
    low_rank = LowRank(layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, float(layer.scaling[adapter]))
    if adapter in layer.lora_magnitude_vector:
        return Directed(low_rank, layer.lora_magnitude_vector[adapter].weight)
    return low_rank


def _read_vera(layer: VeraLayer, adapter: str) -> LowRank:
    a = layer.vera_A[adapter][:, : layer.in_features].to(layer.vera_lambda_d[adapter].device)
    b = layer.vera_B[adapter][: layer.out_features].to(layer.vera_lambda_b[adapter].device)
    return LowRank(layer.vera_lambda_d[adapter][:, None] * a, layer.vera_lambda_b[adapter][:, None] * b, 1.0)


def _replace(module: nn.Module) -> Iterator[tuple[str, Change]]:
    yield from ((name, Replaced(parameter)) for name, parameter in module.named_parameters())


def find_base(model: nn.Module, path: str) -> nn.Module:
    """Return the base's own layer at a path of the plain model; of a head, peft gives parts of the adapter's."""
    found = model
    for name in path.split("."):
        found = _base_of(found.get_submodule(name))
    return found


def _base_of(layer: nn.Module) -> nn.Module:
    """Return the plain layer under an adapter's, or the layer itself."""
    found: nn.Module = layer
    if isinstance(layer, BaseTunerLayer):
        found = layer.get_base_layer()
    elif isinstance(layer, ModulesToSaveWrapper):
        found = layer.original_module
    return found


def is_soft_prompt(model: nn.Module) -> bool:
    """Whether a model has virtual tokens in place of changed weights."""
    return isinstance(model, peft.PeftModel) and bool(model.active_peft_config.is_prompt_learning)


def _distance(found: Tensor, weight: Tensor) -> float:
    return float(torch.linalg.vector_norm(found.float() - weight.float()))
