"""Which rows every step sees: a pure function of (seed, step), so a resumed run needs no loader state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from smolora.config.training import TrainingConfig
from smolora.runtime.seeding import permutation


@dataclass
class StepPlan:
    """The order of `num_rows` rows over the steps of a run on `num_processes` processes.

    An epoch is a seeded permutation cut into groups of `rows_per_step`; its last group is as small as what is left.
    """

    num_rows: int
    config: TrainingConfig
    num_processes: int = 1
    _epoch: int = field(default=-1, init=False)
    _order: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64), init=False)

    @property
    def rows_per_step(self) -> int:
        """Rows of a full step over all processes."""
        return self.config.rows_per_step * self.num_processes

    @property
    def steps_per_epoch(self) -> int:
        """Updates in one pass over the rows, the last, smaller one included."""
        return math.ceil(self.num_rows / self.rows_per_step)

    @property
    def total_steps(self) -> int:
        """Updates of the run: `max_steps` where set, else what the epochs need."""
        return self.config.max_steps or max(1, math.ceil(self.config.num_train_epochs * self.steps_per_epoch))

    @property
    def eval_steps(self) -> int:
        """Updates from one evaluation to the next: as set, else a fifth of the run."""
        return self.config.eval_steps or math.ceil(self.total_steps / 5)

    def rows_of(self, step: int) -> np.ndarray:
        """Return the rows of update `step` (from 0), over all processes."""
        epoch, group = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self.num_rows, self.config.seed, "order", epoch)
        return self._order[group * self.rows_per_step : (group + 1) * self.rows_per_step]

    def micro_batches(self, step: int, process: int = 0) -> list[np.ndarray]:
        """Return the rows of each micro-step of update `step` on one process."""
        mine = self.rows_of(step)[process :: self.num_processes]
        size = self.config.per_device_train_batch_size
        return [mine[start : start + size] for start in range(0, len(mine), size)]


@dataclass
class ChosenSteps(StepPlan):
    """Steps with the rows that they are given, whatever order a run would take."""

    groups: Sequence[np.ndarray] = ()

    @property
    def total_steps(self) -> int:
        """As many as there are groups."""
        return len(self.groups)

    def rows_of(self, step: int) -> np.ndarray:
        """Return the rows of update `step` (from 0)."""
        return self.groups[step]
