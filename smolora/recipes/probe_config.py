"""From gradients to a configuration with its reasons: what to adapt, at which rank, and what to train when.

The rules are few and stated in the file that is written. None of them proves anything: `smolora compare` does.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import yaml

from smolora.config import ExperimentConfig, LoRAConfig, PhaseConfig, PhaseStart
from smolora.errors import ConfigError
from smolora.training.gradient_mass import GradientMass, ModuleMass

RANK_SPAN = 4
"""No rank is more than so many times the asked one."""

FEWEST_STEPS = 20
"""A shorter run gets no phases."""

_SMALLEST_PHASE = 0.1
"""A group with less of the gradient gets no phase of its own."""


@dataclass(frozen=True)
class ProbePlan:
    """What a probe proposes."""

    ranked: tuple[ModuleMass, ...]
    """All modules, the densest first."""
    ranks: dict[str, int]
    """Of the modules to adapt, in the order of the model."""
    budget: int
    """Parameters of a uniform adapter on every linear module."""
    spent: int
    """Parameters of the proposed one."""
    groups: dict[str, float]
    """Share of the gradient by group, the largest first."""
    phases: tuple[PhaseConfig, ...]
    """Proposed, but not switched on."""

    def held_by(self, ranks: Mapping[str, int]) -> float:
        """Return the share of the gradient in the directions that adapters of these ranks could hold at best."""
        held = sum(sum(module.spectrum[: ranks.get(module.module, 0)]) for module in self.ranked)
        return held / sum(sum(module.spectrum) for module in self.ranked)


def read_lora(config: ExperimentConfig) -> LoRAConfig:
    """Return the adapter that a probe shares out.

    Raises:
        ConfigError: It isn't plain LoRA's.
    """
    if not isinstance(config.adapter, LoRAConfig):
        raise ConfigError(f"adapter.method: a probe proposes ranks of lora, and {config.adapter.method} was asked for.")
    return config.adapter


def plan_probe(measured: GradientMass, *, r: int, total_steps: int) -> ProbePlan:
    """Return what to adapt, with as many parameters at most as rank `r` on every module has."""
    ranked = tuple(sorted(measured.modules, key=lambda module: -module.density))
    budget = r * sum(module.parameters_per_rank for module in ranked)
    found = _share_ranks(ranked, r=r, budget=budget)
    kept = [module for module in measured.modules if found[module.module]]
    ranks = {module.module: found[module.module] for module in kept}
    spent = sum(ranks[module.module] * module.parameters_per_rank for module in kept)
    groups = _share_groups(kept)
    phases = _plan_phases(groups) if total_steps >= FEWEST_STEPS else ()
    return ProbePlan(ranked, ranks, budget, spent, groups, phases)


def _share_ranks(modules: Sequence[ModuleMass], *, r: int, budget: int) -> Counter[str]:
    """Return the ranks that hold most of the gradient for the budget: each unit where it has most per parameter.

    The size of a gradient alone doesn't ask for rank: a large one may lie in a single direction, which one unit holds.
    """
    units = [
        (mass / module.parameters_per_rank, module)
        for module in modules
        for mass in module.spectrum[: min(module.largest_rank, r * RANK_SPAN)]
        if mass > 0
    ]
    ranks: Counter[str] = Counter()
    left = budget
    for _, module in sorted(units, key=lambda unit: -unit[0]):
        if module.parameters_per_rank <= left:
            ranks[module.module] += 1
            left -= module.parameters_per_rank
    return ranks


def _share_groups(kept: Sequence[ModuleMass]) -> dict[str, float]:
    total = sum(module.mass for module in kept)
    shares = {group: sum(m.mass for m in kept if m.group == group) / total for group in {m.group for m in kept}}
    return dict(sorted(shares.items(), key=lambda item: (-item[1], item[0])))


def _plan_phases(groups: dict[str, float]) -> tuple[PhaseConfig, ...]:
    """Return everything for half of the run, then each large group for its share of the other half."""
    large = {group: share for group, share in groups.items() if share >= _SMALLEST_PHASE}
    if len(large) < 2:
        return ()
    phases, start = [PhaseConfig()], 0.5
    for group, share in large.items():
        phases.append(PhaseConfig.model_validate({"groups": (group,), "start": PhaseStart(fraction=round(start, 3))}))
        start += 0.5 * share / sum(large.values())
    return tuple(phases)


def render_config(config: ExperimentConfig, measured: GradientMass, plan: ProbePlan, *, num_batches: int) -> str:
    """Return the YAML that `smolora train` takes: `config` with the plan in it, and the reasons as comments."""
    settings = config.model_dump(mode="json", exclude_unset=True)
    asked = read_lora(config)
    adapter = settings.pop("adapter", {}) | {"r": asked.r, "lora_alpha": asked.lora_alpha}
    for name in ("target_modules", "rank_pattern", "alpha_pattern"):
        adapter.pop(name, None)
    settings.pop("phases", None)
    phases = [phase.model_dump(mode="json", exclude_unset=True) for phase in plan.phases]
    return "\n".join(
        [
            _comment(*describe_probe(measured, plan, num_batches=num_batches)),
            _comment(
                "A proposal, which was no better where it was tried: hold it against a uniform rank (smolora compare)."
            ),
            _dump(settings),
            "adapter:",
            textwrap.indent(_dump(adapter), "  "),
            textwrap.indent(_dump({"target_modules": list(plan.ranks)}), "  "),
            "  rank_pattern:",
            *_render_ranks(plan),
            "  # Alphas follow the ranks, so that every module keeps the scale lora_alpha / r.",
            textwrap.indent(_dump({"alpha_pattern": _follow(plan.ranks, asked)}), "  "),
            _comment(describe_phases(plan)),
            *([_dump({"phases": {"enabled": False, "table": phases}})] if phases else []),
            "",
        ]
    )


def describe_probe(measured: GradientMass, plan: ProbePlan, *, num_batches: int) -> list[str]:
    """Return what was measured and what follows from it, a sentence each."""
    top, last = plan.ranked[0], plan.ranked[-1]
    groups = ", ".join(f"{group} {100 * share:.0f} %" for group, share in plan.groups.items())
    measure = (
        f"Measured over {num_batches} batches without an update: loss {measured.loss:.4f}; the two halves of the "
        f"batches agree with a cosine of {measured.agreement:.2f}."
    )
    ends = f"Most gradient per parameter: {top.module} ({100 * _share(top, plan):.1f} % of all); least: {last.module}."
    targets = f"{len(plan.ranks)} of {len(plan.ranked)} modules are adapted ({groups} of their gradient)."
    uniform = plan.budget // sum(module.parameters_per_rank for module in plan.ranked)
    ranks = (
        "Each unit of rank is where one more direction of the gradient has most of it per parameter: "
        f"{plan.spent:,} parameters, whose directions hold {100 * plan.held_by(plan.ranks):.0f} % of the gradient. "
        f"{plan.budget:,} in a uniform rank of {uniform} could hold "
        f"{100 * plan.held_by({module.module: uniform for module in plan.ranked}):.0f} %."
    )
    doubt = "Halves that agree so little rank by chance in part: take more batches (--batches), or more rows."
    return [measure, *([doubt] if measured.agreement < 0.5 else []), ends, targets, ranks]


def describe_phases(plan: ProbePlan) -> str:
    """Return why the phases are as they are, or why there are none."""
    if plan.phases:
        return (
            "Phases, switched off: everything for half of the run, then each group for its share of the gradient, the "
            "largest first. They save time; no comparison so far found a lower loss. phases.enabled=true switches "
            "them on."
        )
    if len([share for share in plan.groups.values() if share >= _SMALLEST_PHASE]) < 2:
        return "No phases: one group holds nearly all of the gradient."
    return f"No phases: the run has fewer than {FEWEST_STEPS} steps."


def _render_ranks(plan: ProbePlan) -> list[str]:
    modules = {module.module: module for module in plan.ranked}
    return [
        f"    {name}: {rank}  # {100 * _share(modules[name], plan):.1f} % of the gradient, "
        f"{100 * modules[name].spectrum[0] / sum(modules[name].spectrum):.0f} % of that in one direction"
        for name, rank in plan.ranks.items()
    ]


def _share(module: ModuleMass, plan: ProbePlan) -> float:
    return module.mass / sum(other.mass for other in plan.ranked)


def _follow(ranks: dict[str, int], asked: LoRAConfig) -> dict[str, float]:
    return {name: rank * asked.lora_alpha / asked.r for name, rank in ranks.items()}


def _comment(*sentences: str) -> str:
    return "\n".join(
        textwrap.fill(sentence, 110, initial_indent="# ", subsequent_indent="# ") for sentence in sentences
    )


def _dump(settings: dict[str, object]) -> str:
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).rstrip()
