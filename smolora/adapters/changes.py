"""What an adapter makes of the base's own parameters, read from peft's layers: for merging, and to measure movement.

Weights are [out, in] here, as linear layers hold them, however a family stores them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import peft
import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.ia3.layer import IA3Layer
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.vera.layer import VeraLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn

from smolora.adapters.adapter_files import trains_biases
from smolora.adapters.tensors import adapter_tensors
from smolora.models.anatomy import PEFT_PREFIX
from smolora.models.structure import is_stored_transposed, read_bias

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
    """[out]; of an embedding, whose rows are its inputs, [width]"""
    along: int = 1
    """The dimension that a length is measured along: the inputs'."""

    def apply(self, weight: Tensor) -> Tensor:
        moved = self.low_rank.apply(weight)
        factors = self.lengths.float() / torch.linalg.vector_norm(moved, dim=self.along)
        return moved.mul_(factors.unsqueeze(self.along))

    def measure(self, weight: Tensor) -> float:
        return _distance(self.apply(weight), weight)


@dataclass(frozen=True)
class Experts:
    """A matrix of each expert, all in one tensor, and LoRA on each."""

    parts: Sequence[LowRank]

    def apply(self, weight: Tensor) -> Tensor:
        return torch.stack([part.apply(matrix) for part, matrix in zip(self.parts, weight, strict=True)])

    def measure(self, weight: Tensor) -> float:
        return math.hypot(*(part.measure(matrix) for part, matrix in zip(self.parts, weight, strict=True)))


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


@dataclass(frozen=True)
class Rows:
    """An embedding of which the adapter holds its own version of some tokens."""

    tokens: Sequence[int]
    rows: Tensor
    """[tokens, width]"""

    def apply(self, weight: Tensor) -> Tensor:
        tokens = torch.tensor(self.tokens, device=weight.device)
        return weight.to(torch.float32, copy=True).index_copy_(0, tokens, self.rows.float())

    def measure(self, weight: Tensor) -> float:
        return _distance(self.rows, weight[list(self.tokens)])


@torch.no_grad()
def find_changes(model: nn.Module, adapter: str = "default") -> dict[str, Change]:
    """Return what an adapter changes, by the parameter's name in the plain model; soft prompts change a head alone."""
    prefix = "base_model." if is_soft_prompt(model) else PEFT_PREFIX  # peft puts nothing around a base behind them.
    changes = {
        f"{path}.{name}".removeprefix(prefix).replace(".base_layer.", "."): change
        for path, layer in model.named_modules()
        for name, change in _iter_changes(layer, adapter)
    }
    return _find_biases(model, adapter) | changes


_OTHER_BIASES = {"lora_B", "modules_to_save", "original_module"}
"""In the names of biases that aren't the base's, or are of a head that is trained whole."""


def _find_biases(model: nn.Module, adapter: str) -> dict[str, Change]:
    """Return the base's biases that were trained beside the adapter's layers."""
    if not isinstance(model, peft.PeftModel) or not trains_biases(model.peft_config[adapter]):
        return {}
    return {
        name.removeprefix(PEFT_PREFIX).replace(".base_layer.", "."): Replaced(tensor)
        for name, tensor in adapter_tensors(model, adapter).items()
        if name.endswith(".bias") and _OTHER_BIASES.isdisjoint(name.split("."))
    }


def _iter_changes(layer: nn.Module, adapter: str) -> Iterator[tuple[str, Change]]:
    if isinstance(layer, AdaLoraLayer):
        scale = float(layer.scaling[adapter] / (layer.ranknum[adapter] + _ADALORA_EPS))
        yield "weight", LowRank(layer.lora_A[adapter] * layer.lora_E[adapter], layer.lora_B[adapter], scale)
    elif isinstance(layer, ParamWrapper):
        yield layer.parameter_name, _read_experts(layer, adapter)
    elif isinstance(layer, LoraLayer):
        yield "weight", _read_lora(layer, adapter)
        if layer.lora_bias[adapter]:
            added = layer.scaling[adapter] * layer.lora_B[adapter].bias.float()
            base = read_bias(layer.get_base_layer())
            yield "bias", Replaced(added if base is None else base.float() + added)
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
    elif isinstance(layer, TrainableTokensWrapper):
        tokens = layer.token_adapter
        yield "weight", Rows(tokens.token_indices[adapter], tokens.trainable_tokens_delta[adapter])


def _read_lora(layer: LoraLayer, adapter: str) -> Change:
    if adapter in layer.lora_embedding_A:  # An embedding's product is stored [r, tokens] and [width, r].
        a, b = layer.lora_embedding_B[adapter].T, layer.lora_embedding_A[adapter].T
    else:
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    low_rank = LowRank(a, b, float(layer.scaling[adapter]))
    if adapter in layer.lora_magnitude_vector:
        along = 0 if adapter in layer.lora_embedding_A else 1
        return Directed(low_rank, layer.lora_magnitude_vector[adapter].weight, along)
    return low_rank


def _read_experts(layer: ParamWrapper, adapter: str) -> Change:
    """Return LoRA on a parameter that was targeted by name; peft keeps each expert's ranks apart in A, mixed in B."""
    base, scaling = layer.get_base_layer(), float(layer.scaling[adapter])
    a = layer.lora_A[adapter].weight.unflatten(0, (layer.num_experts, -1))  # [experts, r, in]
    b = layer.lora_B[adapter].weight.unflatten(1, (-1, layer.num_experts)).permute(2, 0, 1)  # [experts, out, r]
    if is_stored_transposed(base) or vars(base).get("is_transposed"):
        a, b = b.mT, a.mT
    parts = [LowRank(*matrices, scaling) for matrices in zip(a, b, strict=True)]
    return parts[0] if layer.get_param().ndim == 2 else Experts(parts)


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
    elif isinstance(layer, AuxiliaryTrainingWrapper):
        found = layer.original_module
    return found


def is_soft_prompt(model: nn.Module) -> bool:
    """Whether a model has virtual tokens in place of changed weights."""
    return isinstance(model, peft.PeftModel) and bool(model.active_peft_config.is_prompt_learning)


def _distance(found: Tensor, weight: Tensor) -> float:
    return float(torch.linalg.vector_norm(found.float() - weight.float()))
