"""The gradient observatory: how strongly each group, layer and module is pulled, before clipping.

Norms are L2, in float32 for each tensor; sums of squares are made in float64, so those of the groups add up to the
total's. All of a step are computed in one batch and brought to the CPU in one transfer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from smolora.adapters.fast_path import page_out_copied
from smolora.adapters.tensor_places import LoRAPair, TensorPlace, find_lora_pairs, locate_tensors, read_anatomy
from smolora.records.gradient_log import GradientNormLog
from smolora.records.gradient_summary import GradientSummary
from smolora.training.callback import Callback

if TYPE_CHECKING:
    from smolora.models.anatomy import Anatomy
    from smolora.training.state import StepRecord
    from smolora.training.trainer import Trainer

COLUMNS: Mapping[str, str] = {"attention": "attention", "mlp": "mlp", "embedding": "embed", "head": "lm_head"}
"""Groups of the anatomy that always have a column, and its name. Norms and others have one where they are trained."""


@dataclass(frozen=True)
class GradientNorms:
    """L2 norms of one step's gradients. None where nothing has a gradient, because it is frozen or not there."""

    groups: dict[str, float | None]
    """attention, mlp, embed, lm_head, norm and other where they are trained, and total."""
    layers: dict[str, float | None]
    """By `layer_<i>_<group>`."""
    modules: dict[str, float | None]
    """By path in the plain model."""
    matrices: dict[str, float | None]
    """LoRA's A and B over all modules. While B is still zero, A's gradient is exactly zero."""
    module_matrices: dict[str, float | None]
    """By `<module>/A` and `<module>/B`."""


def measure_gradient_norms(model: nn.Module, anatomy: Anatomy | None = None) -> GradientNorms:
    """Return the norms of the gradients that `model` holds now; nothing is changed.

    Args:
        model: A GPTModel, or one of transformers' or peft's.
        anatomy: Of the plain model; read anew at each call where it is left out.

    Example:
        ```python
        model(input_ids, labels=input_ids).loss.backward()
        norms = measure_gradient_norms(model)
        print(norms.groups["total"], norms.layers["layer_0_attention"])
        ```
    """
    anatomy = anatomy or read_anatomy(model)
    places = locate_tensors((name for name, _ in model.named_parameters()), anatomy)
    parameters = dict(model.named_parameters())
    kept = {name: p for name, p in parameters.items() if p.requires_grad or places[name].matrix}
    meter = GradientMeter(kept, places)
    return meter.read(meter.measure())


class GradientMeter:
    """Measures a fixed set of tensors, whose places are looked up once."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], places: Mapping[str, TensorPlace]) -> None:
        self.parameters = dict(parameters)
        self.places = {name: places[name] for name in parameters}

    def measure(self) -> dict[str, Tensor]:
        """Return the norm of every gradient, still on its device."""
        present = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        return measure_norms(present)

    def read(self, measured: Mapping[str, Tensor]) -> GradientNorms:
        """Bring what `measure` returned to the CPU and add it up."""
        norms = to_floats(measured)
        return GradientNorms(
            groups={**self.sum_groups(norms), "total": _norm_of(norms.values())},
            layers=self._sum_layers(norms),
            modules=_sum_by({name: place.module for name, place in self.places.items()}, norms),
            matrices=_sum_by({name: place.matrix for name, place in self.places.items() if place.matrix}, norms),
            module_matrices=_sum_by(
                {name: f"{place.module}/{place.matrix}" for name, place in self.places.items() if place.matrix}, norms
            ),
        )

    def sum_groups(self, norms: Mapping[str, float]) -> dict[str, float | None]:
        """Return the norms by group, under the names of the columns."""
        columns = {name: COLUMNS.get(place.group, place.group) for name, place in self.places.items()}
        return {**dict.fromkeys(COLUMNS.values()), **_sum_by(columns, norms)}

    def _sum_layers(self, norms: Mapping[str, float]) -> dict[str, float | None]:
        placed = sorted(
            ((place.layer, place.group, name) for name, place in self.places.items() if place.layer is not None)
        )
        return _sum_by({name: f"layer_{layer}_{group}" for layer, group, name in placed}, norms)


def measure_norms(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the L2 norm of each tensor in float32, computed in one batch, on its device."""
    if not tensors:
        return {}
    return dict(zip(tensors, torch._foreach_norm(list(tensors.values()), 2, dtype=torch.float32), strict=True))


def to_floats(measured: Mapping[str, Tensor]) -> dict[str, float]:
    """Bring numbers to the CPU in one transfer."""
    return dict(zip(measured, torch.stack(list(measured.values())).tolist(), strict=True)) if measured else {}


@torch.no_grad()
def measure_delta_norms(pairs: Iterable[LoRAPair]) -> dict[str, Tensor]:
    """Return |scaling * B A| of each module, of PiSSA less its start, without a product as large as the weight.

    |B A|^2 = trace((B^T B) (A A^T)), of two matrices of r x r.
    """
    norms = {}
    for pair in pairs:
        a, b = (factor.float() for factor in pair.change)
        square = ((b.T @ b) * (a @ a.T)).sum().clamp(min=0.0)  # Rounding may leave a small negative number.
        norms[pair.module] = pair.scaling * square.sqrt()
    return norms


class GradientNormCallback(Callback):
    """Measures every step, and records the logged ones; beside the gradients, how far the weights went.

    Args:
        log: Where to write; without it the numbers are only in `latest` and `summary`.
    """

    def __init__(self, log: GradientNormLog | None = None) -> None:
        self.log = log
        self.reset()
        self._meter = GradientMeter({}, {})
        self._pairs: list[LoRAPair] = []
        self._weight_norms: dict[str, float] = {}
        self._measured: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}

    def reset(self) -> None:
        self.latest: GradientNorms | None = None
        self.summary = GradientSummary()

    def on_train_begin(self, trainer: Trainer) -> None:
        self.begin(trainer.bundle.model, trainer.parameters, trainer.bundle.anatomy, taken=trainer.bundle.taken)
        if self.log and trainer.is_main_process:
            self.log.cut(trainer.state.step)

    def on_gradients(self, trainer: Trainer) -> None:
        self.take(self._meter.measure())
        if trainer.will_log(trainer.state.step + 1):
            self.keep_weights()

    def on_log(self, trainer: Trainer, record: StepRecord) -> None:
        if trainer.is_main_process:
            self.record(record.step, record.phase)

    def begin(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        anatomy: Anatomy,
        *,
        taken: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Look up what `parameters` are; any loop can drive what follows, in this order, as `on_...` do.

        Args:
            model: It may carry an adapter.
            parameters: Those that are trained.
            anatomy: Of the plain model.
            taken: What a PiSSA adapter took out of the base.
        """
        self._meter = GradientMeter(parameters, locate_tensors(parameters, anatomy))
        self._pairs = find_lora_pairs(model, taken)
        self._weight_norms = to_floats(
            {pair.module: pair.measure_base() for pair in self._pairs if pair.weight.is_floating_point()}
        )
        page_out_copied(model)  # Reading brought them back.

    def take(self, measured: Mapping[str, Tensor]) -> None:
        """Take the norms of this step's gradients, by parameter, before clipping."""
        self._measured = dict(measured)

    def keep_weights(self) -> None:
        """Remember the weights before the update, to tell how far it moved them."""
        self._before = {name: self._meter.parameters[name].detach().clone() for name in self._measured}

    def record(self, step: int, phase: int) -> None:
        """Write what was taken, after the update."""
        norms = self.latest = self._meter.read(self._measured)
        active = sum(self._meter.parameters[name].numel() for name in self._measured)
        if self.log:
            self.log.append(step, phase, active, norms.groups, norms.layers)
        self.summary.add(step, phase, active, {**_name_norms(norms), **self._measure_weights()})
        self._before = {}

    def write_summary(self) -> None:
        """Write summary.json, where there is a log."""
        if self.log:
            places = {place.module: (place.group, place.layer) for place in self._meter.places.values()}
            self.log.write_summary(self.summary.to_dict(places))

    def on_save(self, trainer: Trainer) -> None:
        self.write_summary()

    def on_train_end(self, trainer: Trainer) -> None:
        if trainer.is_main_process:
            self.write_summary()

    def state_dict(self) -> Mapping[str, object]:
        return self.summary.to_state()

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        self.summary = GradientSummary.from_state(state)

    @torch.no_grad()
    def _measure_weights(self) -> dict[str, float | None]:
        """Return how far this update moved each module and group, and how large each adapter's delta has become."""
        now = {name: self._meter.parameters[name].detach() for name in self._before}
        moved: dict[str, Tensor] = {}
        if now:
            moved = dict(zip(now, torch._foreach_sub(list(now.values()), list(self._before.values())), strict=True))
        kinds = {"move": measure_norms(moved), "size": measure_norms(now), "delta": measure_delta_norms(self._pairs)}
        flat = to_floats({f"{kind}/{name}": norm for kind, norms in kinds.items() for name, norm in norms.items()})
        move, size, delta = (_take(flat, kind) for kind in kinds)
        return {**self._name_updates(move, size), **self._name_deltas(delta)}

    def _name_updates(self, move: Mapping[str, float], size: Mapping[str, float]) -> dict[str, float | None]:
        modules = {name: f"modules/{place.module}" for name, place in self._meter.places.items()}
        groups = {name: f"groups/{COLUMNS.get(place.group, place.group)}" for name, place in self._meter.places.items()}
        ratios: dict[str, float | None] = {}
        for owners in (modules, groups):
            moves, sizes = _sum_by(owners, move), _sum_by(owners, size)
            ratios |= {f"{owner}/update_ratio": _divide(moves[owner], sizes[owner]) for owner in moves}
        return ratios

    def _name_deltas(self, delta: Mapping[str, float]) -> dict[str, float | None]:
        named: dict[str, float | None] = {}
        for module, norm in delta.items():
            named[f"modules/{module}/delta_norm"] = norm
            named[f"modules/{module}/delta_ratio"] = _divide(norm, self._weight_norms.get(module))
        group_of = {
            place.module: f"groups/{COLUMNS.get(place.group, place.group)}" for place in self._meter.places.values()
        }
        owners = {module: group_of[module] for module in delta}
        deltas, weights = _sum_by(owners, delta), _sum_by(owners, self._weight_norms)
        return named | {f"{group}/delta_ratio": _divide(deltas[group], weights[group]) for group in deltas}


def _name_norms(norms: GradientNorms) -> dict[str, float | None]:
    """Return the norms under the paths that they have in the summary."""
    tables = {
        "groups/{}/norm": norms.groups,
        "matrices/{}/norm": norms.matrices,
        "modules/{}/norm": norms.modules,
        "modules/{}": norms.module_matrices,
    }
    return {path.format(name): norm for path, table in tables.items() for name, norm in table.items()}


def _sum_by(owners: Mapping[str, str], norms: Mapping[str, float]) -> dict[str, float | None]:
    """Return the norm over the tensors of each owner, in the owners' order; None where none of them has one."""
    members: dict[str, list[float]] = defaultdict(list)
    for name, owner in owners.items():
        members[owner] += [norms[name]] if name in norms else []
    return {owner: _norm_of(parts) for owner, parts in members.items()}


def _norm_of(norms: Iterable[float]) -> float | None:
    parts = list(norms)
    return math.sqrt(math.fsum(norm * norm for norm in parts)) if parts else None


def _take(flat: Mapping[str, float], kind: str) -> dict[str, float]:
    return {name.removeprefix(f"{kind}/"): value for name, value in flat.items() if name.startswith(f"{kind}/")}


def _divide(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator is not None and denominator else None
