"""What each phase trained, in the words of phase_report.json.

Without that file they are read off the gradient log: the groups and layers that had a gradient. The log doesn't tell
LoRA's two matrices apart; where a phase trains one alone, the configuration says which.
"""

from __future__ import annotations

import numpy as np

from smolora.analysis.run_record import Array, Mask, NormTable, PhaseSpan, RunRecord
from smolora.errors import DataError


def describe_phases(record: RunRecord) -> dict[str, str]:
    """Return what each phase trained by its name, such as "attention and mlp", "mlp" or "layers 0 to 5, B".

    It is empty where it isn't known.
    """
    said = record.phase_selections
    return {span.name: said.get(span.name) or _read_off(record, span) for span in record.phases}


def _read_off(record: RunRecord, span: PhaseSpan) -> str:
    try:
        groups, layers = record.group_norms, record.layer_norms
    except DataError:
        return ""
    inside = steps_within(groups.steps, span)
    trained = [name for name, column in groups.groups.items() if np.isfinite(column[inside]).any()]
    parts = [
        " and ".join(trained),
        _describe_layers(steps_within(layers.steps, span), layers),
        _find_matrix(span, record.settings.get("phases.table")),
    ]
    return ", ".join(part for part in parts if part)


def steps_within(steps: Array, span: PhaseSpan) -> Mask:
    """Return which of `steps` are in the phase, as a mask."""
    return (steps >= span.first) & (steps <= span.last)


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
    return f"layers {found[0]} to {found[-1]}" if is_range else f"layers {', '.join(map(str, found))}"


def _find_matrix(span: PhaseSpan, table: object) -> str:
    """Return which of LoRA's matrices a phase of the configuration's table trained, or nothing where it is both."""
    numbered = enumerate(table if isinstance(table, list) else [], start=1)
    chosen = {str(number): phase.get("matrices") for number, phase in numbered if isinstance(phase, dict)}
    return str(chosen.get(span.name) or "")
