"""What `smolora evaluate` is asked. No torch: what contradicts itself is said before it is imported."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from smolora.config.data import DataConfig
from smolora.errors import ConfigError
from smolora.generation.sampling import SamplingSettings


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """What is evaluated, on what, and how."""

    model: str | None = None
    """A run, a model or adapter folder, or a hub id."""
    base: str | None = None
    """The base of an adapter, where its folder doesn't lead to it."""
    predictions: Path | None = None
    """Or a file with a prediction a line."""
    benchmark: str | None = None
    data_dir: Path | None = None
    """The benchmark's folder."""
    split: str = "test"
    data: DataConfig = field(default_factory=DataConfig)
    """Or a person's own rows."""
    num_samples: int | None = None
    batch_size: int = 16
    settings: SamplingSettings | None = None
    by_likelihood: bool = False
    out: Path | None = None
    device: str = "auto"

    def check(self) -> None:
        """Raise unless it is clear what to evaluate on what.

        Raises:
            ConfigError: It isn't.
        """
        if (self.model is None) == (self.predictions is None):
            raise ConfigError("name a model, or a file with --predictions: one of the two.")
        if (self.benchmark is None) != bool(self.data.sources):
            raise ConfigError("name the rows with --benchmark NAME (and its --data-dir), or with --data FILE.")
        if self.predictions is not None and self.benchmark is None:
            raise ConfigError("--predictions are of a benchmark's rows: name it with --benchmark NAME --data-dir DIR.")
        for name, number in (("--num-samples", self.num_samples), ("--batch-size", self.batch_size)):
            if number is not None and number < 1:
                raise ConfigError(f"{name} must be at least 1, found {number}.")
        self._refuse_idle()

    def _refuse_idle(self) -> None:
        """Raise where something is named that changes nothing beside the rest."""
        usual = vars(EvaluationRequest())
        given = {name for name, value in vars(self).items() if value != usual[name]} | self.data.model_fields_set
        drawing = self.settings.model_fields_set if self.settings else set()
        idle_beside = {
            "--predictions": {"base", "by_likelihood", "batch_size", "device", *drawing} if self.predictions else set(),
            "--benchmark": set(DataConfig.model_fields) - {"sources"} if self.benchmark else set(),
            "--data": {"data_dir", "split"} if self.data.sources else set(),
            "--by-likelihood": drawing if self.by_likelihood else set(),
        }
        for flag, idle in idle_beside.items():
            if found := sorted(idle & (given | drawing)):
                names = ", ".join(f"--{name.replace('_', '-')}" for name in found)
                raise ConfigError(f"{names} would change nothing beside {flag}: leave it out.")
        if self.settings:
            self.settings.check_drawing()
