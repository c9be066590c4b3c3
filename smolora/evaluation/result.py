"""The outcome of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from smolora.errors import count_of
from smolora.evaluation.bootstrap import CONFIDENCE, NUM_RESAMPLINGS
from smolora.evaluation.metric import MetricScore


@dataclass(frozen=True)
class EvaluationResult:
    """Numbers with their variants and intervals, and where the answers are kept."""

    scores: Mapping[str, MetricScore]
    num_rows: int
    folder: Path | None = None
    """Holds predictions.jsonl and evaluation.json; None where nothing is kept."""
    num_trained_on: int | None = None
    """Rows that the model was given to learn from; None where nothing tells."""

    @property
    def metrics(self) -> dict[str, float | None]:
        """The numbers by name; None where one can't be computed here."""
        return {name: score.value for name, score in self.scores.items()}

    def to_dict(self) -> dict[str, object]:
        """Return the result as plain values."""
        details = {name: score.to_details() for name, score in self.scores.items()}
        trained = {} if self.num_trained_on is None else {"num_trained_on": self.num_trained_on}
        return {"metrics": self.metrics, "details": details, "num_rows": self.num_rows, **trained}

    def describe(self) -> str:
        """Return a line for each number: name, value, interval, variant and version; then what is missing and why."""
        trained = f", {self.num_trained_on:,} of them learned from" if self.num_trained_on else ""
        intervals = f"{CONFIDENCE * 100:g} % intervals by {NUM_RESAMPLINGS:,} resamplings"
        lines = [f"{count_of(self.num_rows, 'row')}{trained}; in brackets {intervals} of them"]
        width = max(map(len, self.scores), default=0)
        for name, score in self.scores.items():
            if score.value is None:
                lines.append(f"{name:<{width}}  -  {score.variant}: {score.reason}")
                continue
            interval = "" if score.low is None else f"[{score.low:.4f}, {score.high:.4f}]"
            lines.append(f"{name:<{width}}  {score.value:9.4f} {interval:<20}  {score.variant} ({score.version})")
        return "\n".join(lines)
