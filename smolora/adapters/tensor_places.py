"""What every trainable tensor of a model is: its module, group and layer, and whether it is LoRA's A or B.

Read from the anatomy and from the segments that peft appends to a module's path, never from a part of a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import peft
import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from smolora.models.anatomy import PEFT_PREFIX, Anatomy, Group, build_anatomy
from smolora.models.structure import PreTrainedModel, is_stored_transposed

_MATRICES: dict[str, Literal["A", "B"]] = {
    "lora_A": "A",
    "lora_B": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
}


@dataclass(frozen=True)
class TensorPlace:
    """Where one tensor belongs."""

    module: str
    """Path in the plain model."""
    group: Group
    layer: int | None
    matrix: Literal["A", "B"] | None
    """Which of LoRA's two matrices it is, if any."""


@dataclass(frozen=True)
class LoRAPair:
    """What LoRA adds to one module: scaling * B A."""

    module: str
    """Path in the plain model."""
    a: Tensor
    """[r, in]"""
    b: Tensor
    """[out, r]"""
    scaling: float
    base: nn.Module
    """The linear layer under it."""
    start: tuple[Tensor, Tensor] | None = None
    """PiSSA's first A and B, whose product was taken out of the weight."""

    @property
    def change(self) -> tuple[Tensor, Tensor]:
        """A and B of what training adds; B A - B0 A0 as a product in which no large numbers cancel out."""
        if self.start is None:
            return self.a, self.b
        a, b = self.start
        return torch.cat((self.a, self.a - a)), torch.cat((self.b - b, b), dim=1)

    @torch.no_grad()
    def measure_base(self) -> Tensor:
        """Return the norm of the base's own weight, in float32; what PiSSA took out of it is put back."""
        weight = self.weight
        if self.start is not None:
            a, b = self.start
            weight = (weight.T if is_stored_transposed(self.base) else weight).float().addmm(b, a, alpha=self.scaling)
        norm: Tensor = torch.linalg.vector_norm(weight, dtype=torch.float32)
        return norm

    @property
    def weight(self) -> Tensor:
        """The frozen weight, stored either way round. It isn't kept: a sharded layer changes it."""
        return self.base.get_parameter("weight")


def locate_tensors(names: Iterable[str], anatomy: Anatomy) -> dict[str, TensorPlace]:
    """Return the place of each tensor, named as in the plain model or as peft names it."""
    return {name: _locate(name, anatomy) for name in names}


def _locate(name: str, anatomy: Anatomy) -> TensorPlace:
    part = anatomy.part_of(name)
    segment = name.removeprefix(PEFT_PREFIX).removeprefix(f"{part.name}.").partition(".")[0]
    return TensorPlace(part.name, part.group, part.layer, _MATRICES.get(segment))


def find_lora_pairs(model: nn.Module, taken: Mapping[str, Tensor] | None = None) -> list[LoRAPair]:
    """Return the matrices of every linear module that an active LoRA adapter is on, and adds nothing but their product.

    DoRA, which changes a weight's lengths too, has none.

    Args:
        model: It may carry an adapter.
        taken: What a PiSSA adapter took out of the base.
    """
    return [
        LoRAPair(
            path.removeprefix(PEFT_PREFIX),
            layer.lora_A[adapter].weight,
            layer.lora_B[adapter].weight,
            float(layer.scaling[adapter]),
            layer.get_base_layer(),
            (taken[f"{path}.lora_A.weight"], taken[f"{path}.lora_B.weight"]) if taken else None,
        )
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and not isinstance(layer, AdaLoraLayer)
        for adapter in layer.active_adapters
        if adapter in layer.lora_A and adapter not in layer.lora_magnitude_vector
    ]


def read_anatomy(model: nn.Module) -> Anatomy:
    """Return the anatomy of a model that may carry an adapter, where no bundle holds it.

    An adapter's own modules would confuse the reading, so it is done on an empty copy of the plain model.
    """
    plain = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    if plain is model or not isinstance(plain, PreTrainedModel):
        return build_anatomy(plain)
    with torch.device("meta"):
        return build_anatomy(type(plain)(plain.config))
