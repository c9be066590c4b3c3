"""Running statistics of the gradient norms, small enough to travel in every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast


@dataclass
class RunningStatistic:
    """Mean, extreme and last value of one number over the logged steps where it was measured."""

    count: int = 0
    mean: float = 0.0
    max: float = 0.0
    max_step: int = 0
    last: float = 0.0

    def add(self, step: int, value: float) -> None:
        """Take one value."""
        self.count += 1
        self.mean += (value - self.mean) / self.count
        self.last = value
        if self.count == 1 or value > self.max:
            self.max, self.max_step = value, step


@dataclass
class _PhaseSpan:
    active: int
    first_step: int
    last_step: int


class GradientSummary:
    """What summary.json says, by paths such as `groups/attention/norm`."""

    def __init__(self) -> None:
        self._statistics: dict[str, RunningStatistic] = {}
        self._phases: dict[str, _PhaseSpan] = {}

    def add(self, step: int, phase: int, active: int, values: Mapping[str, float | None]) -> None:
        """Take what one logged step measured; None is left out."""
        span = self._phases.setdefault(str(phase), _PhaseSpan(active, step, step))
        span.last_step = step
        of_phase = {
            f"phases/{phase}/{path}": value
            for path, value in values.items()
            if path.startswith("groups/") and path.endswith("/norm")
        }
        for path, value in {**values, **of_phase}.items():
            if value is not None:
                self._statistics.setdefault(path, RunningStatistic()).add(step, value)

    def to_dict(self, places: Mapping[str, tuple[str, int | None]]) -> dict[str, object]:
        """Return the summary as nested objects.

        Args:
            places: Group and layer of each module.
        """
        summary: dict[str, object] = {"groups": {}, "matrices": {}, "modules": {}, "phases": {}}
        for path, statistic in self._statistics.items():
            _put(summary, path.split("/"), dict(vars(statistic)))
        modules = cast("dict[str, dict[str, object]]", summary["modules"])
        summary["modules"] = {
            name: {"group": places[name][0], "layer": places[name][1], **numbers} for name, numbers in modules.items()
        }
        phases = cast("dict[str, dict[str, object]]", summary["phases"])
        summary["phases"] = {name: {**vars(span), **phases.get(name, {})} for name, span in self._phases.items()}
        return summary

    def to_state(self) -> dict[str, object]:
        """Return what a checkpoint keeps."""
        return {
            "statistics": {path: list(vars(statistic).values()) for path, statistic in self._statistics.items()},
            "phases": {name: list(vars(span).values()) for name, span in self._phases.items()},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, object]) -> GradientSummary:
        """Return the summary that `to_state` described."""
        summary = cls()
        statistics = cast("Mapping[str, tuple[int, float, float, int, float]]", state["statistics"])
        summary._statistics = {path: RunningStatistic(*values) for path, values in statistics.items()}
        phases = cast("Mapping[str, tuple[int, int, int]]", state["phases"])
        summary._phases = {name: _PhaseSpan(*values) for name, values in phases.items()}
        return summary


def _put(tree: dict[str, object], path: list[str], value: object) -> None:
    *parents, leaf = path
    for parent in parents:
        tree = cast("dict[str, object]", tree.setdefault(parent, {}))
    tree[leaf] = value
