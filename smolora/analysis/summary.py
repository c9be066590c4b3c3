"""A run in plain words: what was trained, how the loss went, where the gradient was and when, stalls and spikes.

Every sentence is read off the run's files by a rule that stands in the text, and where there is too little to go by,
the text says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from smolora.analysis.findings import (
    FEWEST_STEPS,
    SPIKE_RULE,
    STALL_RULE,
    Spike,
    find_lowest,
    find_spikes,
    find_stalls,
    layer_totals,
    mean_shares,
    measure_shares,
)
from smolora.analysis.phases import describe_phases, steps_within
from smolora.analysis.run_record import Array, Mask, PhaseSpan, RunRecord, RunSource, open_runs
from smolora.errors import DataError, count_of
from smolora.records.verdict_file import describe_verdict, list_samples

_STANDS_OUT = 1.5
"""A layer is named when its share is so many times an even one."""

_EVEN = 1.5
"""Shares are even where the largest is at most so many times the smallest."""

_COLLAPSE = 0.01
"""A norm this small a part of that of the phase before is said."""

_FEWEST_FOR_STALL = 20

_IRREGULARITIES = "Stalls and spikes"

_OF_A_METHOD = {
    "r": "r",
    "init_r": "r at the start",
    "target_r": "at the end",
    "lora_alpha": "alpha",
    "num_virtual_tokens": "virtual tokens",
    "target_modules": "targets",
    "layers": "layers",
}
"""Settings of a method by what they are called; each method has some."""


@dataclass(frozen=True)
class Section:
    """A heading and what is said under it."""

    title: str
    sentences: list[str]


def generate_summary_report(run: RunSource) -> str:
    """Return what a run did in plain words, as text with a heading a section.

    Raises:
        DataError: The run is missing.
    """
    [record] = open_runs([run])
    sections = summarise(record)
    return render_summary(record.name, sections) + render_rules(sections)


def render_summary(title: str, sections: Sequence[Section]) -> str:
    """Return sections as text."""
    parts = [f"{section.title}\n" + "\n".join(f"- {line}" for line in section.sentences) for section in sections]
    return "\n\n".join([title, *parts]) + "\n"


def render_rules(sections: Sequence[Section]) -> str:
    """Return the rules of what `sections` say as text, a line each."""
    return "".join(f"\n{rule}\n" for rule in list_rules(sections))


def list_rules(sections: Sequence[Section]) -> list[str]:
    """Return what `sections` call a stall and a spike; nothing where they speak of none."""
    return [STALL_RULE, SPIKE_RULE] if any(section.title == _IRREGULARITIES for section in sections) else []


def summarise(record: RunRecord) -> list[Section]:
    """Return the sections of the summary."""
    sections = [*_say_verdict(record), Section("What was trained", list(_say_what(record)))]
    sections.append(Section("Loss", list(_say_loss(record))))
    count = len(record.curve("loss")[0]) if record.has_curve("loss") else 0
    if count < FEWEST_STEPS:
        few = f"{count_of(count, 'logged step')}: too few to say where it learned, stalled or spiked"
        return [*sections, Section("Where the gradient was", [f"{few} ({FEWEST_STEPS} at least)."])]
    sections.append(Section("Where the gradient was", list(_say_where(record))))
    if record.phases:
        sections.append(Section("Phases", list(_say_phases(record))))
    sections.append(Section(_IRREGULARITIES, list(_say_irregularities(record))))
    return sections


def _say_verdict(record: RunRecord) -> Iterator[Section]:
    if record.verdict is None:
        return
    yield Section("Verdict", describe_verdict(record.verdict))
    answers = [
        f"{sample['prompt']!r}: base {sample['base']!r}; tuned {sample['tuned']!r}; right {sample['reference']!r}."
        for sample in list_samples(record.verdict)
    ]
    if answers:
        yield Section("Answers to held-out rows", answers)


def _say_what(record: RunRecord) -> Iterator[str]:
    settings = record.settings
    if not settings:
        yield f"{record.run.resolved_config.name} is lost, so what was trained isn't known."
        return
    if "gpt.num_layers" in settings:
        layers = count_of(int(str(settings["gpt.num_layers"])), "layer")
        yield f"A GPT from nothing: {layers}, width {settings.get('gpt.width')}, context {settings.get('gpt.context')}."
    else:
        found = {word: settings.get(f"adapter.{name}") for name, word in _OF_A_METHOD.items()}
        chosen = ", ".join(f"{word} {_list(value)}" for word, value in found.items() if value is not None)
        method = f"{settings.get('adapter.method')}{f': {chosen}' if chosen else ''}"
        yield f"{settings.get('model.name_or_path')} with {method}."
    yield f"Data: {_list(settings.get('data.sources'))}."
    asked = settings.get("training.max_steps")
    goal = f" of {asked:,}" if isinstance(asked, int) else ""
    yield (
        f"Trained to step {record.last_step:,}{goal} at a peak learning rate of "
        f"{settings.get('training.learning_rate')}, {_describe_pass(settings)} a pass."
    )


def _describe_pass(settings: Mapping[str, object]) -> str:
    tokens = settings.get("speed.max_tokens_per_batch")
    return f"up to {tokens} tokens" if tokens else f"{settings.get('training.per_device_train_batch_size')} rows"


def _say_loss(record: RunRecord) -> Iterator[str]:
    if record.has_curve("loss"):
        steps, losses = record.curve("loss")
        yield f"Training loss {losses[0]:.3f} at step {steps[0]:,.0f}, {losses[-1]:.3f} at step {steps[-1]:,.0f}."
    else:
        yield "No training step is logged as yet."
    held_out = record.curve("eval_loss") if record.has_curve("eval_loss") else None
    best = find_lowest(*held_out) if held_out else None
    if held_out and best:
        yield from _say_held_out(*held_out, best)
    else:
        yield "No held-out loss was measured, so nothing here tells learning from memorising."


def _say_held_out(steps: Array, values: Array, best: tuple[float, float]) -> Iterator[str]:
    first, last = values[0], values[-1]
    yield (
        f"Held-out loss {first:.3f} at step {steps[0]:,.0f}, lowest {best[1]:.3f} at step {best[0]:,.0f}, "
        f"{last:.3f} at the end (step {steps[-1]:,.0f})."
    )
    if steps[0] == 0 and best[0] == 0 and len(steps) > 1:
        yield "It never fell below its start: this run has not learned what the held-out rows ask for."
    elif last > best[1] * 1.01:
        rise = last / best[1] - 1
        yield f"After step {best[0]:,.0f} it rose by {100 * rise:.1f} %: the later steps did not help on held-out rows."


def _say_where(record: RunRecord) -> Iterator[str]:
    try:
        groups, layers = record.group_norms, record.layer_norms
    except DataError as error:
        yield f"Not known: {error}"
        return
    columns = groups.groups
    by_group = measure_shares(np.array(list(columns.values())).reshape(len(columns), -1))
    if record.phases:  # Over the whole run, shares would tell of the schedule: what is frozen has none.
        yield "Squared gradient norm, the mean shares of each phase by itself."
        for period, mask in _periods(record, groups.steps):
            yield f"{period}, by group: {_rank(mean_shares(by_group[:, mask]), columns)}."
    else:
        ranked = _rank(mean_shares(by_group), columns)
        yield f"Squared gradient norm, the mean share over {len(groups.steps):,} logged steps: {ranked}."
    if not layers.layers:
        return
    by_layer = measure_shares(layer_totals(layers.layers))
    if not record.phases:
        yield f"By layer: {_say_layers(mean_shares(by_layer))}."
    for period, mask in _periods(record, layers.steps):
        yield f"{period}: {_say_layers(mean_shares(by_layer[:, mask]))}."
    yield "A share says where the gradient was, not how far the weights moved."


def _rank(shares: Array, names: Iterable[str]) -> str:
    ranked = sorted(zip(shares, names, strict=True), reverse=True)
    return ", ".join(f"{100 * share:.0f} % in {name}" for share, name in ranked if share > 0) or "none"


def _say_layers(shares: Array) -> str:
    """Say which layers stood out from those that had any gradient."""
    order = [int(layer) for layer in np.argsort(-shares, kind="stable") if shares[layer] > 0]
    if not order:
        return "none had a gradient"
    if len(order) == 1:
        return f"all of it in layer {order[0]}"
    even = 1 / len(order)
    ahead = [f"{100 * shares[layer]:.0f} % in layer {layer}" for layer in order if shares[layer] >= _STANDS_OUT * even]
    if ahead:
        return f"{', '.join(ahead[:4])} (an even share is {100 * even:.0f} %)"
    low, high = order[-1], order[0]
    extremes = f"from {100 * shares[low]:.0f} % in layer {low} to {100 * shares[high]:.0f} % in layer {high}"
    return f"spread evenly, {extremes}" if shares[high] <= _EVEN * shares[low] else extremes


def _periods(record: RunRecord, steps: Array) -> Iterator[tuple[str, Mask]]:
    """Yield the phases, or the thirds of a run without any, by what to call them."""
    masks = {f"Phase {phase.name}": steps_within(steps, phase) for phase in record.phases}
    if not masks:
        third = np.arange(len(steps)) * 3 // len(steps)
        masks = {"First third": third == 0, "Middle third": third == 1, "Last third": third == 2}
    for name, mask in masks.items():
        if mask.any():
            yield f"{name} (logged steps {steps[mask][0]:,.0f}-{steps[mask][-1]:,.0f})", mask


def _say_phases(record: RunRecord) -> Iterator[str]:
    texts = describe_phases(record)
    for phase in record.phases:
        trained = texts[phase.name] or "what it trained isn't known"
        about = f"{trained}{_say_active(record, phase)}; {_say_change(record, phase)}"
        about += _say_movement(record.phase_certificates.get(phase.name, {}))
        yield f"Phase {phase.name} (logged steps {phase.first:,}-{phase.last:,}): {about}."


def _say_active(record: RunRecord, phase: PhaseSpan) -> str:
    try:
        table = record.group_norms
    except DataError:
        return ""
    active = table.columns["active"][steps_within(table.steps, phase)] if "active" in table.columns else np.array([])
    return f", {active[0]:,.0f} trainable parameters" if len(active) and np.isfinite(active[0]) else ""


def _say_change(record: RunRecord, phase: PhaseSpan) -> str:
    """Say the loss at both ends of a phase, each the mean of a few steps, as one step says little."""
    steps, losses = record.curve("loss")
    inside = losses[steps_within(steps, phase)]
    inside = inside[np.isfinite(inside)]
    if not len(inside):
        return "no loss logged"
    few = min(5, (len(inside) + 1) // 2)
    of_steps = f" (means of {few} logged steps)" if few > 1 else ""
    return f"training loss {inside[:few].mean():.3f} to {inside[-few:].mean():.3f}{of_steps}"


def _say_movement(certificate: Mapping[str, object]) -> str:
    """Say how far the groups moved in a phase, as its certificate measured it, and what it found wrong."""
    groups = certificate.get("groups")
    distances = {
        name: group.get("relative_distance")
        for name, group in (groups.items() if isinstance(groups, dict) else ())
        if isinstance(group, dict)
    }
    moved = [
        f"{name} by {100 * way:.1f} %" for name, way in distances.items() if isinstance(way, float | int) and way > 0
    ]
    text = f"; moved, of its length: {', '.join(moved)}" if moved else ""
    problems = certificate.get("problems")
    return f"{text}; the certificate failed: {_list(problems)}" if problems else text


def _say_irregularities(record: RunRecord) -> Iterator[str]:
    steps, losses = record.curve("loss")
    stalls = find_stalls(steps, losses)
    if stalls:
        yield (
            "The training loss stalled in " + ", ".join(f"steps {each.first:,}-{each.last:,}" for each in stalls) + "."
        )
    else:
        yield (
            "The training loss did not stall."
            if len(steps) >= _FEWEST_FOR_STALL
            else f"{len(steps)} logged steps are too few to see a stall ({_FEWEST_FOR_STALL} at least)."
        )
    yield from _say_spikes("loss", find_spikes(steps, losses, record.phases))
    if record.has_curve("grad_norm"):
        yield from _say_spikes("gradient norm", find_spikes(*record.curve("grad_norm"), record.phases))
        yield from _say_collapses(*record.curve("grad_norm"), record.phases)


def _say_spikes(name: str, spikes: Sequence[Spike]) -> Iterator[str]:
    if not spikes:
        yield f"No spike of the {name}."
        return
    highest = max(spikes, key=lambda spike: spike.ratio)
    count = count_of(len(spikes), "spike")
    places = ", ".join(_place(spike) for spike in spikes[:5]) + (", and later ones" if len(spikes) > 5 else "")
    yield f"{count} of the {name}: {places}; the highest {highest.ratio:.1f} times what came before it."


def _say_collapses(steps: Array, norms: Array, phases: Sequence[PhaseSpan]) -> Iterator[str]:
    known = np.isfinite(norms)
    inside = [(phase, norms[steps_within(steps, phase) & known]) for phase in phases]
    medians = [(phase, float(np.median(values))) for phase, values in inside if len(values)]
    for (_, before), (phase, after) in itertools.pairwise(medians):
        if after < _COLLAPSE * before:
            yield (
                f"In phase {phase.name} the median gradient norm is {after:.1g}, after {before:.1g} in the phase "
                "before: there is hardly any gradient in what it trains."
            )


def _place(spike: Spike) -> str:
    return f"step {spike.first:,}" if spike.first == spike.last else f"steps {spike.first:,}-{spike.last:,}"


def _list(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
