"""From gradients to a configuration with its reasons: what to adapt, at which rank, and what to train when.

The rules are few and stated in the file that is written. None of them proves anything: `smolora compare` does.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from smolora.config import ExperimentConfig, PhaseConfig, PhaseStart
from smolora.training.gradient_mass import GradientMass, ModuleMass

KEPT_SHARE = 0.9
"""Modules are adapted, the densest first, until they hold this share of the gradient."""

RANK_SPAN = 4
"""No rank is more than so many times the asked one, or less than that fraction of it."""

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

    @property
    def kept_mass(self) -> float:
        """The share of the gradient in what is adapted."""
        total = sum(module.mass for module in self.ranked)
        return sum(module.mass for module in self.ranked if module.module in self.ranks) / total


def plan_probe(measured: GradientMass, *, r: int, total_steps: int) -> ProbePlan:
    """Return what to adapt, with as many parameters at most as rank `r` on every module has."""
    ranked = tuple(sorted(measured.modules, key=lambda module: -module.density))
    kept = _keep(ranked)
    budget = r * sum(module.parameters_per_rank for module in ranked)
    found = _share_ranks(kept, r=r, budget=budget)
    ranks = {module.module: found[module.module] for module in measured.modules if module in kept}
    spent = sum(ranks[module.module] * module.parameters_per_rank for module in kept)
    groups = _share_groups(kept)
    phases = _plan_phases(groups) if total_steps >= FEWEST_STEPS else ()
    return ProbePlan(ranked, ranks, budget, spent, groups, phases)


def _keep(ranked: Sequence[ModuleMass]) -> list[ModuleMass]:
    enough, held, kept = KEPT_SHARE * sum(module.mass for module in ranked), 0.0, []
    for module in ranked:
        if held >= enough:
            break
        kept.append(module)
        held += module.mass
    return kept


def _share_ranks(kept: Sequence[ModuleMass], *, r: int, budget: int) -> dict[str, int]:
    """Return ranks proportional to the root of the density, as large as the budget lets them be."""
    lowest, highest = max(1, r // RANK_SPAN), r * RANK_SPAN

    def ranks_at(scale: float) -> dict[str, int]:
        return {m.module: min(m.largest_rank, highest, max(lowest, int(scale * m.density**0.5))) for m in kept}

    def cost_at(scale: float) -> int:
        ranks = ranks_at(scale)
        return sum(ranks[module.module] * module.parameters_per_rank for module in kept)

    low, high = 0.0, (highest + 1) / min(module.density for module in kept) ** 0.5
    if cost_at(high) <= budget:
        return ranks_at(high)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost_at(middle) <= budget else (low, middle)
    return ranks_at(low)


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
    adapter = settings.pop("adapter", {}) | {"r": config.adapter.r, "lora_alpha": config.adapter.lora_alpha}
    for name in ("target_modules", "rank_pattern", "alpha_pattern"):
        adapter.pop(name, None)
    settings.pop("phases", None)
    phases = [phase.model_dump(mode="json", exclude_unset=True) for phase in plan.phases]
    return "\n".join(
        [
            _comment(*describe_probe(measured, plan, num_batches=num_batches)),
            _comment("It is a proposal. Whether it is better than the plain one is told by smolora compare."),
            _dump(settings),
            "adapter:",
            textwrap.indent(_dump(adapter), "  "),
            textwrap.indent(_dump({"target_modules": list(plan.ranks)}), "  "),
            "  rank_pattern:",
            *_render_ranks(plan),
            "  # Alphas follow the ranks, so that every module keeps the scale lora_alpha / r.",
            textwrap.indent(_dump({"alpha_pattern": _follow(plan.ranks, config)}), "  "),
            _comment(describe_phases(plan)),
            *([_dump({"phases": {"table": phases}})] if phases else []),
            "",
        ]
    )


def describe_probe(measured: GradientMass, plan: ProbePlan, *, num_batches: int) -> list[str]:
    """Return what was measured and what follows from it, a sentence each."""
    top, last = plan.ranked[0], plan.ranked[-1]
    groups = ", ".join(f"{group} {share:.0%}" for group, share in plan.groups.items())
    measure = (
        f"Measured over {num_batches} batches without an update: loss {measured.loss:.4f}; the two halves of the "
        f"batches agree with a cosine of {measured.agreement:.2f}."
    )
    ends = f"Most gradient per parameter: {top.module} ({_share(top, plan):.1%} of all); least: {last.module}."
    targets = (
        f"{len(plan.ranks)} of {len(plan.ranked)} modules hold {plan.kept_mass:.0%} of the gradient ({groups} of that) "
        "and are adapted; the others have less of it per parameter."
    )
    ranks = (
        f"Ranks grow with the root of the gradient per parameter: {plan.spent:,} parameters, where a uniform rank on "
        f"every module has {plan.budget:,}."
    )
    doubt = "Halves that agree so little rank by chance in part: take more batches (--batches)."
    return [measure, *([doubt] if measured.agreement < 0.5 else []), ends, targets, ranks]


def describe_phases(plan: ProbePlan) -> str:
    """Return why the phases are as they are, or why there are none."""
    if plan.phases:
        return "Everything for half of the run, then each group for its share of the gradient, the largest first."
    if len([share for share in plan.groups.values() if share >= _SMALLEST_PHASE]) < 2:
        return "No phases: one group holds nearly all of the gradient."
    return f"No phases: the run has fewer than {FEWEST_STEPS} steps."


def _render_ranks(plan: ProbePlan) -> list[str]:
    mean = sum(module.mass for module in plan.ranked) / sum(module.parameters_per_rank for module in plan.ranked)
    modules = {module.module: module for module in plan.ranked}
    return [
        f"    {name}: {rank}  # {_share(modules[name], plan):.1%} of the gradient, "
        f"{modules[name].mass / modules[name].parameters_per_rank / mean:.1f} times the mean per parameter"
        for name, rank in plan.ranks.items()
    ]


def _share(module: ModuleMass, plan: ProbePlan) -> float:
    return module.mass / sum(other.mass for other in plan.ranked)


def _follow(ranks: dict[str, int], config: ExperimentConfig) -> dict[str, float]:
    return {name: rank * config.adapter.lora_alpha / config.adapter.r for name, rank in ranks.items()}


def _comment(*sentences: str) -> str:
    return "\n".join(
        textwrap.fill(sentence, 110, initial_indent="# ", subsequent_indent="# ") for sentence in sentences
    )


def _dump(settings: dict[str, object]) -> str:
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).rstrip()
