"""Which rows every step sees: a pure function of (seed, step), so a resumed run needs no loader state."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from smolora.config.speed import SpeedConfig
from smolora.config.training import TrainingConfig
from smolora.errors import ConfigError
from smolora.runtime.seeding import permutation


@dataclass
class StepPlan:
    """The order of `num_units` rows over the steps of a run on `num_processes` processes.

    An epoch is a seeded permutation cut into groups of `units_per_step`; its last group is as small as what is left,
    and may leave a process without a row. Which rows a step has depends on how many, not on how many processes.
    """

    num_units: int
    """Rows; whole passes where those are made by tokens."""
    config: TrainingConfig
    num_processes: int = 1
    _epoch: int = field(default=-1, init=False)
    _order: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64), init=False)

    @property
    def units_per_step(self) -> int:
        """Units of a full step over all processes."""
        return self.config.rows_per_step * self.num_processes

    @property
    def mean_rows(self) -> float:
        """Rows of a full step; where they differ, their mean."""
        return min(self.units_per_step, self.num_units)

    @property
    def steps_per_epoch(self) -> int:
        """Updates in one pass over the rows, the last, smaller one included."""
        return math.ceil(self.num_units / self.units_per_step)

    @property
    def total_steps(self) -> int:
        """Updates of the run: `max_steps` where set, else what the epochs need."""
        return self.config.max_steps or max(1, math.ceil(self.config.num_train_epochs * self.steps_per_epoch))

    @property
    def eval_steps(self) -> int:
        """Updates from one evaluation to the next: as set, else a fifth of the run."""
        return self.config.eval_steps or math.ceil(self.total_steps / 5)

    def micro_batches(self, step: int, process: int = 0) -> list[np.ndarray]:
        """Return the rows of each micro-step of update `step` (from 0) on one process."""
        epoch, group = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._order_rows(epoch)
        units = self._order[group * self.units_per_step : (group + 1) * self.units_per_step]
        mine = units[process :: self.num_processes]
        size = self.config.per_device_train_batch_size
        return [mine[start : start + size] for start in range(0, len(mine), size)]

    def _order_rows(self, epoch: int) -> np.ndarray:
        return permutation(self.num_units, self.config.seed, "order", epoch)


class LengthGroupedSteps(StepPlan):
    """Rows of like length share a step: an epoch's random order is sorted by length, some steps' worth at a time.

    Args:
        lengths: Tokens of every row.
        config: Says how many rows a step has, and the seed.
        num_processes: Over which they are spread.
    """

    def __init__(self, lengths: np.ndarray, config: TrainingConfig, num_processes: int = 1) -> None:
        super().__init__(len(lengths), config, num_processes)
        self._lengths = lengths

    def _order_rows(self, epoch: int) -> np.ndarray:
        order, size = super()._order_rows(epoch), self.units_per_step
        ending = len(order) // size * size  # What is left fills no step and stays as it is.
        steps: list[np.ndarray] = []
        for start in range(0, ending, size * _STEPS_SORTED):
            part = order[start : min(ending, start + size * _STEPS_SORTED)]
            steps.extend(part[np.argsort(self._lengths[part], kind="stable")].reshape(-1, size))
        mixed = [steps[place] for place in permutation(len(steps), self.config.seed, "steps", epoch)]
        return np.concatenate([*mixed, order[ending:]])


class TokenBudgetSteps(StepPlan):
    """A pass has as many rows as fit into a budget of tokens; an epoch is every pass once, in a seeded order.

    Args:
        lengths: Tokens of every row.
        budget: Input tokens of a pass.
        config: Says how many passes a step has, and the seed.
        num_processes: Over which the passes of a step are spread.

    Raises:
        ConfigError: A row is longer than the budget.
    """

    def __init__(self, lengths: np.ndarray, budget: int, config: TrainingConfig, num_processes: int = 1) -> None:
        if len(lengths) and lengths.max() > budget:
            raise ConfigError(
                f"speed.max_tokens_per_batch={budget}: a row has {lengths.max()} tokens, and none is split. "
                f"Raise it, or cut rows with data.max_length={budget} data.overlong=truncate."
            )
        self._passes = pack_best_fit(lengths, budget, seed=config.seed)
        super().__init__(len(self._passes), config.replace(per_device_train_batch_size=1), num_processes)

    @property
    def mean_rows(self) -> float:
        """Mean number of rows of a step."""
        return sum(map(len, self._passes)) / self.steps_per_epoch

    def micro_batches(self, step: int, process: int = 0) -> list[np.ndarray]:
        """Return the rows of each micro-step of update `step` (from 0) on one process."""
        return [self._passes[int(number)] for (number,) in super().micro_batches(step, process)]


def require_reach(done: int, total_steps: int) -> None:
    """Raise where a run that is resumed has done more than the steps asked for.

    Raises:
        ConfigError: It has.
    """
    if done > total_steps:
        raise ConfigError(
            f"the run has done {done} steps, more than the {total_steps} asked for. "
            "Ask for as many or more, or start a new run in another folder."
        )


_STEPS_SORTED = 50
"""Steps whose rows are sorted together: enough for like lengths, few enough to stay random."""


def plan_steps(lengths: np.ndarray, config: TrainingConfig, speed: SpeedConfig, num_processes: int = 1) -> StepPlan:
    """Return which rows every step of a run sees, over rows of so many tokens.

    Raises:
        ConfigError: A row is longer than `max_tokens_per_batch`.
    """
    if speed.max_tokens_per_batch:
        return TokenBudgetSteps(lengths, speed.max_tokens_per_batch, config, num_processes)
    if speed.group_by_length:
        return LengthGroupedSteps(lengths, config, num_processes)
    return StepPlan(len(lengths), config, num_processes)


def pack_best_fit(lengths: Sequence[int] | np.ndarray, budget: int, *, seed: int) -> list[np.ndarray]:
    """Put every row, in a seeded order, into the pass that it fills best; return the rows of each pass.

    No pass holds more than `budget` tokens, and no row alone may. (Best fit: at most 1.7 times the fewest passes,
    Johnson et al. 1974; with rows far below the budget, close to none more.)

    >>> [rows.tolist() for rows in pack_best_fit([6, 5, 4, 3], 9, seed=0)]
    [[2, 1], [3, 0]]
    """
    shortest = min(lengths, default=0)
    passes: list[list[int]] = []
    room: list[tuple[int, int]] = []
    """(tokens that still fit, number of the pass) of every pass that can take another row, ascending."""
    for row in permutation(len(lengths), seed, "pack"):
        length = int(lengths[row])
        place = bisect_left(room, (length, 0))
        left, number = room.pop(place) if place < len(room) else (budget, len(passes))
        if number == len(passes):
            passes.append([])
        passes[number].append(int(row))
        if left - length >= shortest:
            insort(room, (left - length, number))
    return [np.array(rows) for rows in passes]


@dataclass
class ChosenSteps(StepPlan):
    """Steps with the passes that they are given, whatever order a run would take."""

    steps: list[list[np.ndarray]] = field(default_factory=list)

    @property
    def total_steps(self) -> int:
        """As many as there are."""
        return len(self.steps)

    def micro_batches(self, step: int, process: int = 0) -> list[np.ndarray]:
        """Return the rows of each micro-step of update `step` (from 0)."""
        return self.steps[step]
