"""The folders of a probe and of a comparison: the only place that knows the names of their files."""

from __future__ import annotations

from pathlib import Path


class ProbeDir:
    """What `smolora probe` leaves."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "probe.yaml"
        self.figures = self.path / "probe.json"
        self.plot = self.path / "probe.png"


class ComparisonDir:
    """What `smolora compare` leaves: a run for each configuration and seed, and what they say together."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.result = self.path / "comparison.json"
        self.plot = self.path / "comparison.png"

    def run(self, name: str, seed: int) -> Path:
        """The folder of one run."""
        return self.path / name / f"seed-{seed}"

    def outcome(self, name: str, seed: int) -> Path:
        """What one run reached. It is written last, so where it is, the run is finished."""
        return self.run(name, seed) / "outcome.json"
