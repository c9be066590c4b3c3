"""How far an adapter moves the weights it is on: the norm of the change, held against the weight's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import peft
import torch
from torch import Tensor, nn

from smolora.adapters.changes import Change, LowRank, find_base, find_changes
from smolora.adapters.starts import subtract_start
from smolora.adapters.tensors import adapter_tensors
from smolora.models.anatomy import PEFT_PREFIX
from smolora.models.bundle import ModelBundle
from smolora.models.quantised import dequantise
from smolora.models.structure import is_quantised, is_stored_transposed, read_bias


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
def measure_movement(bundle: ModelBundle, base: nn.Module | None = None) -> Movement:
    """Return how far each changed module is from the base's; without an adapter nothing has changed.

    Args:
        bundle: The tuned model.
        base: What it was before, where all of it was trained.
    """
    if not isinstance(bundle.model, peft.PeftModel):
        return Movement(0.0, {}) if base is None else _compare(bundle.model, base)
    plain = bundle.model.get_base_model()
    norms: dict[str, tuple[float, float]] = {}
    for name, (change, start) in _find_changes(bundle).items():
        module, _, own = name.rpartition(".")
        weight = _read_weight(find_base(plain, module), own)
        weight = start.apply(weight) if start else weight
        moved, held = norms.get(module, (0.0, 0.0))  # A module may have a bias too.
        norms[module] = math.hypot(moved, change.measure(weight)), math.hypot(held, _length(weight))
    return _sum_up(norms)


def _compare(model: nn.Module, base: nn.Module) -> Movement:
    before, norms = dict(base.named_parameters()), dict[str, tuple[float, float]]()
    for name, parameter in model.named_parameters():
        module = name.rpartition(".")[0]
        moved, held = norms.get(module, (0.0, 0.0))
        weight = before[name].to(parameter.device)
        norms[module] = math.hypot(moved, _length(parameter - weight)), math.hypot(held, _length(weight))
    return _sum_up(norms)


def _sum_up(norms: Mapping[str, tuple[float, float]]) -> Movement:
    moved, held = (math.hypot(*(pair[side] for pair in norms.values())) for side in (0, 1))
    return Movement(_divide(moved, held), {name: _divide(*pair) for name, pair in norms.items()})


def _find_changes(bundle: ModelBundle) -> dict[str, tuple[Change, Change | None]]:
    """Return each change, and what to put back first into a base that something was taken out of."""
    changes, taken = find_changes(bundle.model), bundle.taken
    if taken is None:
        return {name: (change, None) for name, change in changes.items()}
    assert isinstance(bundle.model, peft.PeftModel), "PiSSA is an adapter"
    joined = subtract_start(adapter_tensors(bundle.model), taken)
    found: dict[str, tuple[Change, Change | None]] = {}
    for name, change in changes.items():
        if not isinstance(change, LowRank):
            found[name] = change, None  # A head that is trained whole.
            continue
        a, b = (f"{PEFT_PREFIX}{name.removesuffix('.weight')}.lora_{side}.weight" for side in "AB")
        start = LowRank(taken[a], taken[b], change.scaling)
        found[name] = LowRank(joined[a], joined[b], change.scaling), start
    return found


def _read_weight(base: nn.Module, name: str) -> Tensor:
    if name == "weight" and is_quantised(base):
        return dequantise(base, torch.float32)
    if name == "bias" and read_bias(base) is None:  # LoRA may bring one along.
        return torch.zeros(())
    weight = base.get_parameter(name)
    return weight.T if name == "weight" and is_stored_transposed(base) else weight


def _length(weight: Tensor) -> float:
    return float(torch.linalg.vector_norm(weight, dtype=torch.float32))


def _divide(moved: float, held: float) -> float:
    return moved / held if held else moved
