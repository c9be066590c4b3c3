"""What each phase trained, read off the gradient log: the groups and layers that had a gradient in it."""

from __future__ import annotations

import numpy as np

from smolora.analysis.run_record import Array, Mask, NormTable, PhaseSpan, RunRecord
from smolora.errors import DataError


def describe_phases(record: RunRecord) -> dict[str, str]:
    """Return what each phase trained by its name, such as "both", "mlp" or "layers 0-5"; empty where it isn't known."""
    try:
        groups, layers = record.group_norms, record.layer_norms
    except DataError:
        return {span.name: "" for span in record.phases}
    return {span.name: _describe(span, groups, layers) for span in record.phases}


def steps_within(steps: Array, span: PhaseSpan) -> Mask:
    """Return which of `steps` are in the phase, as a mask."""
    return (steps >= span.first) & (steps <= span.last)


def _describe(span: PhaseSpan, groups: NormTable, layers: NormTable) -> str:
    inside = steps_within(groups.steps, span)
    trained = [name for name, column in groups.groups.items() if np.isfinite(column[inside]).any()]
    text = "both" if trained == ["attention", "mlp"] else " + ".join(trained)
    part = _describe_layers(steps_within(layers.steps, span), layers)
    return part if part and text == "both" else f"{text} {part}".strip()


def _describe_layers(inside: Mask, layers: NormTable) -> str:
    """Return the layers that were trained, or nothing where all were."""
    matrices = list(layers.layers.values())
    if not matrices:
        return ""
    trained = np.any([np.isfinite(matrix[:, inside]).any(axis=1) for matrix in matrices], axis=0)
    found = [int(layer) for layer in np.flatnonzero(trained)]
    if len(found) in (0, len(trained)):
        return ""
    if len(found) == 1:
        return f"layer {found[0]}"
    is_range = found == list(range(found[0], found[-1] + 1))
    return f"layers {found[0]}-{found[-1]}" if is_range else f"layers {', '.join(map(str, found))}"
