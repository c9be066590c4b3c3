"""Which tensors each phase of a run trains, and when: a pure function of the step once the starts are known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from smolora.adapters.tensor_places import TensorPlace
from smolora.config.phases import DynamicLoRAConfig, PhaseConfig, resolve_starts
from smolora.errors import ConfigError
from smolora.training.plan import StepPlan


@dataclass(frozen=True)
class PhasePlan:
    """The phases of one run on one model. Index 0 is phase 1."""

    phases: tuple[PhaseConfig, ...]
    tensors: tuple[tuple[str, ...], ...]
    """What each phase trains, by parameter name."""
    starts: tuple[int | None, ...]
    """Updates done before each phase; None for a plateau that hasn't been reached."""
    total_steps: int
    left_out: tuple[str, ...]
    """What no phase trains."""

    def index_at(self, step: int) -> int:
        """Return the phase of the update that comes after `step` updates."""
        return max(index for index, start in enumerate(self.starts) if start is not None and start <= step)

    def next_start(self, index: int) -> int | None:
        """Return the updates done when the phase after this one begins, where there is one and it is known."""
        return self.starts[index + 1] if index + 1 < len(self.starts) else None

    def end_of(self, index: int) -> int:
        """Return the updates done when a phase ends, as far as is known."""
        return self.next_start(index) or self.total_steps

    def with_start(self, index: int, step: int) -> PhasePlan:
        """Return the plan after a plateau was reached."""
        return replace(self, starts=tuple(step if i == index else start for i, start in enumerate(self.starts)))

    def numbers_not_reached(self, steps: int) -> list[int]:
        """Return the numbers of the phases that had no update in a run of `steps`."""
        return [number for number, start in enumerate(self.starts, start=1) if start is None or start >= steps]


def build_phase_plan(
    config: DynamicLoRAConfig,
    places: Mapping[str, TensorPlace],
    *,
    num_layers: int,
    steps: StepPlan,
    is_evaluated: bool,
    has_drawn_head: bool = False,
    recorded: Sequence[int | None] = (),
) -> PhasePlan:
    """Return the phases of a run.

    Args:
        config: With phases.
        places: Of every trainable tensor.
        num_layers: Blocks of the model.
        steps: Of the run.
        is_evaluated: Whether there are held-out rows.
        has_drawn_head: Whether the model's head is new: every phase of a strategy trains it beside its own tensors.
        recorded: Starts that an earlier part of the same run resolved.

    Raises:
        ConfigError: A phase would train nothing, have no update, or wait for an evaluation that never comes.
    """
    phases = config.phases
    if not is_evaluated and any(_waits_for_evaluation(phase) for phase in phases):
        raise ConfigError("phases: a plateau of eval_loss needs held-out rows. Give --eval-data, or choose loss.")
    tensors = tuple(tuple(select_tensors(phase, places, num_layers=num_layers)) for phase in phases)
    for number, (phase, chosen) in enumerate(zip(phases, tensors, strict=True), start=1):
        if not chosen:
            raise ConfigError(
                f"phases: phase {number} ({describe_phase(phase)}) trains nothing: the adapter has "
                f"{_describe_places(places.values(), num_layers)}. {_advise(places.values(), num_layers)}"
            )
    if config.end is not None and config.end != steps.total_steps:
        raise ConfigError(
            f"phases.end: the phases were written for a run of {config.end} steps, and this one has "
            f"{steps.total_steps}. Set training.max_steps={config.end}, or leave phases.end away."
        )
    starts = resolve_starts(
        phases, total_steps=steps.total_steps, steps_per_epoch=steps.steps_per_epoch, recorded=recorded
    )
    if has_drawn_head and not config.table:
        head = tuple(name for name, place in places.items() if place.group == "head")
        tensors = tuple((*chosen, *head) for chosen in tensors)
    left_out = tuple(name for name in places if not any(name in chosen for chosen in tensors))
    return PhasePlan(phases, tensors, tuple(starts), steps.total_steps, left_out)


def _waits_for_evaluation(phase: PhaseConfig) -> bool:
    return phase.start is not None and phase.start.plateau is not None and phase.start.plateau.metric == "eval_loss"


def select_tensors(phase: PhaseConfig, places: Mapping[str, TensorPlace], *, num_layers: int) -> Iterator[str]:
    """Yield the tensors that every condition of `phase` holds for."""
    layers = _layers_of(phase, num_layers)
    for name, place in places.items():
        is_chosen = (
            (not phase.groups or place.group in phase.groups)
            and (layers is None or place.layer in layers)
            and phase.matrices in (None, place.matrix)
            and (phase.pattern is None or fnmatchcase(place.module, phase.pattern))
        )
        if is_chosen:
            yield name


def _layers_of(phase: PhaseConfig, num_layers: int) -> range | None:
    if phase.layers is None:
        return None
    if phase.layers == "early":
        return range(num_layers // 2)
    if phase.layers == "late":
        return range(num_layers // 2, num_layers)
    first, last = phase.layers
    return range(first, last + 1)


def describe_phase(phase: PhaseConfig) -> str:
    """Return what a phase selects, in words.

    >>> describe_phase(PhaseConfig(groups=("mlp",), layers="late", matrices="B"))
    'mlp, late layers, B'
    """
    parts = [" and ".join(phase.groups), _describe_layers(phase), phase.matrices, phase.pattern]
    return ", ".join(part for part in parts if part) or "everything"


def _describe_layers(phase: PhaseConfig) -> str | None:
    if not isinstance(phase.layers, tuple):
        return f"{phase.layers} layers" if phase.layers else None
    first, last = phase.layers
    return f"layer {first}" if first == last else f"layers {first} to {last}"


def _advise(places: Collection[TensorPlace], num_layers: int) -> str:
    if _count_layers(places) < num_layers:
        return "Adapt the other layers too (adapter.layers, --target), or choose another phase."
    if {"attention", "mlp"} & {place.group for place in places}:
        return "Adapt those modules too, such as with --target all, or choose another phase."
    return "This method adapts nothing else: choose phases by layers, such as --phase-strategy early,late."


def _describe_places(places: Collection[TensorPlace], num_layers: int) -> str:
    counts = Counter(place.group for place in places)
    found = ", ".join(f"{count} tensors in {group}" for group, count in counts.items())
    return f"{found}, in {_count_layers(places)} of {num_layers} layers"


def _count_layers(places: Iterable[TensorPlace]) -> int:
    return len({place.layer for place in places} - {None})
