"""What is measured on held-out rows while a run learns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from smolora.config.base import Section


class EvaluationConfig(Section):
    """Held-out rows, batch size and early stopping of evaluation during a run."""

    batch_size: int = Field(default=8, ge=1)
    """Rows in one forward pass of evaluation."""

    split_seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Seed of the choice of held-out rows, where they have no source of their own. Left out, `training.seed`."""

    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations in a row without improvement. Left out: never."""

    early_stopping_threshold: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """How much lower the evaluation loss must be to count as improvement, in nats a token."""

    plateau_patience: int | None = Field(default=None, ge=1)
    """Lower the learning rate after so many evaluations in a row without improvement. Left out: never."""

    plateau_factor: float = Field(default=0.5, gt=0.0, lt=1.0)
    """What the learning rate is multiplied by there, for the rest of the run."""

    verdict_share: float = Field(default=0.1, ge=0.0, allow_inf_nan=False)
    """Time for the verdict at the end of `train`, as a share of that of the updates, but a second at least. 0: none."""

    require: Literal["learned"] | None = None
    """End `train` with exit code 6 where the verdict is another one, and `pretrain` where the held-out loss never fell
    below its start. Left out, only a broken run ends so."""

    def find_idle(self) -> Mapping[str, str]:
        """Return what waits for a patience."""
        pairs = {"early_stopping_threshold": "early_stopping_patience", "plateau_factor": "plateau_patience"}
        return {name: patience for name, patience in pairs.items() if vars(self)[patience] is None}

    def choose_split_seed(self, seed: int) -> int:
        """Return the seed of the held-out rows of a run with this seed."""
        return seed if self.split_seed is None else self.split_seed
