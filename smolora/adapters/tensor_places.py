"""What every trainable tensor of a model is: its module, group and layer, and whether it is LoRA's A or B.

Read from the anatomy and from the segments that peft appends to a module's path, never from a part of a word.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import peft
import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from smolora.models.anatomy import PEFT_PREFIX, Anatomy, Group, build_anatomy
from smolora.models.structure import PreTrainedModel

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


def find_lora_pairs(model: nn.Module) -> list[LoRAPair]:
    """Return the matrices of every linear module that an active LoRA adapter is on."""
    return [
        LoRAPair(
            path.removeprefix(PEFT_PREFIX),
            layer.lora_A[adapter].weight,
            layer.lora_B[adapter].weight,
            float(layer.scaling[adapter]),
            layer.get_base_layer(),
        )
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and not isinstance(layer, AdaLoraLayer)
        for adapter in layer.active_adapters
        if adapter in layer.lora_A
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
