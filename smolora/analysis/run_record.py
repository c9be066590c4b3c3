"""What a run left, as arrays: each file of its folder is read when it is first asked for.

NaN stands for what has no number: a frozen group, or a value that wasn't finite. A run that is still going can be read:
a last line that was only half written is left out.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

from smolora.config import flatten_settings
from smolora.errors import DataError, suggest_path
from smolora.records.metrics_log import MetricsLog, Scalar
from smolora.records.run_dir import RunDir
from smolora.records.verdict_file import read_verdict

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

GROUPS = ("attention", "mlp", "embed", "lm_head", "norm", "other")
"""The columns whose squares sum to the square of `total`; the last two are there only where they are trained."""

_LOADER = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
"""libyaml reads a configuration in a tenth of the time."""

_LAYER_COLUMN = re.compile(r"layer_(\d+)_(\w+)")


@dataclass(frozen=True)
class PhaseSpan:
    """An interval with a fixed trainable set, as far as the logged steps show it."""

    name: str
    first: int
    """The first logged step in it."""
    last: int
    """The last one."""
    start: float
    """Where it is drawn from: halfway from the last update before it to its first, as far as those are known."""
    end: float


@dataclass(frozen=True)
class NormTable:
    """Gradient norms by column, a value per logged step."""

    steps: Array
    phases: tuple[str, ...]
    columns: dict[str, Array]

    @property
    def groups(self) -> dict[str, Array]:
        """The groups that were trained at some step."""
        return {name: self.columns[name] for name in GROUPS if has_number(self.columns.get(name))}

    @property
    def layers(self) -> dict[str, Array]:
        """For each group the norms [layers, steps], NaN where a layer was frozen."""
        found = [(match, name) for name in self.columns if (match := _LAYER_COLUMN.fullmatch(name))]
        count = 1 + max((int(match[1]) for match, _ in found), default=-1)
        matrices: dict[str, Array] = {}
        for match, name in found:
            if has_number(self.columns[name]):
                matrix = matrices.setdefault(match[2], np.full((count, len(self.steps)), np.nan))
                matrix[int(match[1])] = self.columns[name]
        return matrices


class RunRecord:
    """One run's folder, to be read."""

    def __init__(self, path: str | Path) -> None:
        """Open the folder.

        Raises:
            DataError: No run is there.
        """
        self.run = RunDir(path)
        self.name_parts = 1
        if not self.run.metrics.is_file():
            raise DataError(
                f"{path} holds no run: there is no {self.run.metrics.name}.{suggest_path(self.run.path)} "
                "Name a folder that smolora train or smolora pretrain wrote."
            )

    @property
    def name(self) -> str:
        """The last parts of the folder's path, on one line: one, unless runs side by side must be told apart."""
        return " ".join("/".join(self.run.path.resolve().parts[-self.name_parts :]).split())

    @cached_property
    def settings(self) -> dict[str, object]:
        """The configuration by dotted path; empty where it is lost."""
        try:
            stored = yaml.load(self.run.resolved_config.read_text(encoding="utf-8"), Loader=_LOADER)
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            return {}
        return flatten_settings(stored) if isinstance(stored, dict) else {}

    @cached_property
    def metrics(self) -> list[dict[str, Scalar]]:
        """Every line of the metrics that has a step."""
        return [line for line in MetricsLog(self.run.metrics).read() if isinstance(line.get("step"), int)]

    @cached_property
    def last_step(self) -> int:
        """The last step that is logged, or saved after that, as in a run that was stopped."""
        logged = [int(str(line["step"])) for line in self.metrics]
        return max([*logged, *(saved.step for saved in self.run.checkpoints())], default=0)

    def curve(self, name: str) -> tuple[Array, Array]:
        """Return the steps at which `name` was logged, and its values.

        Raises:
            DataError: It never was.
        """
        lines = [line for line in self.metrics if name in line]
        if not lines:
            raise DataError(f"{self.run.metrics} has no '{name}' as yet. Plot it once the run has logged a step.")
        return _to_array([line["step"] for line in lines]), _to_array([line[name] for line in lines])

    def has_curve(self, name: str) -> bool:
        """Whether `name` was ever logged."""
        return any(name in line for line in self.metrics)

    @cached_property
    def group_norms(self) -> NormTable:
        """The gradient norms by group.

        Raises:
            DataError: The run kept none, or the file is damaged.
        """
        return _read_norms(self.run.group_norms)

    @cached_property
    def layer_norms(self) -> NormTable:
        """The gradient norms by layer and group.

        Raises:
            DataError: The run kept none, or the file is damaged.
        """
        return _read_norms(self.run.layer_norms)

    @cached_property
    def verdict(self) -> dict[str, object] | None:
        """What the run said of itself at its end; None where it said nothing."""
        return read_verdict(self.run.verdict)

    @cached_property
    def phases(self) -> list[PhaseSpan]:
        """The phases of the run in order; empty where all of it was one."""
        lines = [line for line in self.metrics if "phase" in line]
        starts = self._phase_report.get("starts")
        known = {str(number): start for number, start in enumerate(starts if isinstance(starts, list) else [], start=1)}
        return find_phases(_to_array([line["step"] for line in lines]), [str(line["phase"]) for line in lines], known)

    @cached_property
    def _phase_report(self) -> dict[str, object]:
        try:
            report = json.loads(self.run.phase_report.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return report if isinstance(report, dict) else {}

    @cached_property
    def phase_selections(self) -> dict[str, str]:
        """What the run itself said that each phase trains, by the phase's name; empty where there is no report."""
        selects = self._phase_report.get("selects")
        numbered = enumerate(selects if isinstance(selects, list) else [], start=1)
        return {str(number): str(text) for number, text in numbered}

    @cached_property
    def phase_certificates(self) -> dict[str, dict[str, object]]:
        """What the run itself proved of each phase, by the phase's name; empty where there is no whole report."""
        phases = self._phase_report.get("phases")
        found = [phase for phase in phases if isinstance(phase, dict)] if isinstance(phases, list) else []
        return {str(phase.get("phase")): phase for phase in found}


RunSource = str | Path | RunRecord
"""A run's folder, or one that was opened."""


def open_runs(runs: Sequence[RunSource]) -> list[RunRecord]:
    """Open every folder that isn't open yet; those of one name are named with the folder that each is in.

    Raises:
        DataError: None was named, or one is missing.
    """
    if not runs:
        raise DataError("no run was named. Name the folder of one, or of several.")
    records = [run if isinstance(run, RunRecord) else RunRecord(run) for run in runs]
    counts = Counter(record.name for record in records)
    for record in [record for record in records if counts[record.name] > 1]:
        record.name_parts = 2
    return records


def find_phases(
    steps: Sequence[float] | Array, phases: Sequence[str], starts: Mapping[str, object] | None = None
) -> list[PhaseSpan]:
    """Return the runs of equal phase names; empty where there is only one.

    Args:
        steps: The logged ones.
        phases: The phase of each.
        starts: The updates done before a phase, by its name. Without it a border is halfway between logged steps.

    >>> [(span.name, span.first, span.last, span.end) for span in find_phases([1, 2, 3, 4], ["1", "1", "2", "2"])]
    [('1', 1, 2, 2.5), ('2', 3, 4, 4.0)]
    """
    runs = [(name, [int(step) for step, _ in members]) for name, members in _group_by_phase(steps, phases)]
    if len(runs) < 2:
        return []
    borders = [
        _find_border(before[-1], after[0], (starts or {}).get(name))
        for (_, before), (name, after) in itertools.pairwise(runs)
    ]
    edges = [float(runs[0][1][0]), *borders, float(runs[-1][1][-1])]
    return [
        PhaseSpan(name, members[0], members[-1], start, end)
        for (name, members), (start, end) in zip(runs, itertools.pairwise(edges), strict=True)
    ]


def _find_border(before: int, after: int, start: object) -> float:
    """Return the border between two logged steps of two phases; a start that can't be is passed over."""
    return start + 0.5 if isinstance(start, int) and before <= start < after else (before + after) / 2


def _group_by_phase(steps: Sequence[float] | Array, phases: Sequence[str]) -> list[tuple[str, list[tuple[float, str]]]]:
    pairs = zip(steps, phases, strict=True)
    return [(name, list(members)) for name, members in itertools.groupby(pairs, key=lambda pair: pair[1])]


def _read_norms(path: Path) -> NormTable:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise DataError(
            f"there is no {path}: this run kept no gradient log. "
            "Tuning runs (smolora train) write one; train again to see where it learns."
        ) from None
    whole = text[: text.rfind("\n") + 1]  # The line that a writer is at, or was killed in, has no end yet.
    head, *rows = list(csv.reader(whole.splitlines())) or [[]]
    if head[:2] != ["step", "phase"]:
        raise DataError(f"{path} isn't a gradient log: its columns must begin with step, phase; found {head[:2]}.")
    if not rows:
        raise DataError(f"{path} has no row as yet. Plot it once the run has logged a step.")
    try:
        cells = [[float(cell) if cell else np.nan for cell in (row[0], *row[2:])] for row in rows]
        matrix = np.array(cells, dtype=np.float64).reshape(len(rows), len(head) - 1)
    except (ValueError, IndexError) as error:
        raise DataError(f"{path} is damaged: {error}. Remove it, or restore it from a copy.") from None
    columns = {name: matrix[:, index] for index, name in enumerate(head[2:], start=1)}
    return NormTable(matrix[:, 0], tuple(row[1] for row in rows), columns)


def _to_array(values: Sequence[Scalar]) -> Array:
    return np.array([value if isinstance(value, int | float) else np.nan for value in values], dtype=np.float64)


def has_number(column: Array | None) -> bool:
    """Whether any value is a finite number."""
    return column is not None and bool(np.isfinite(column).any())
