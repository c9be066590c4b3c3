"""Learning-rate curves as pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from smolora.config.training import ScheduleName
from smolora.errors import ConfigError, did_you_mean

_ONE_CYCLE_START = 1 / 25
_ONE_CYCLE_END = 1 / 250_000
"""Start and end of the one-cycle curve relative to its peak, the defaults of torch's OneCycleLR."""


def resolve_warmup_steps(warmup_steps: float, total_steps: int) -> int:
    """Return whole warm-up steps; below 1 the value is a fraction of all steps."""
    steps = math.ceil(warmup_steps * total_steps) if warmup_steps < 1 else int(warmup_steps)
    return min(steps, max(total_steps - 1, 0))


def schedule_factor(name: ScheduleName, step: int, *, warmup_steps: int, total_steps: int) -> float:
    """Return the learning rate of update `step` (from 0) as a share of the peak.

    Warm-up starts at 1 / (warmup_steps + 1), so no update is spent at a rate of 0, and ends at the peak.

    >>> [round(schedule_factor("linear", s, warmup_steps=1, total_steps=5), 2) for s in range(5)]
    [0.5, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup_steps:
        ramp = (step + 1) / (warmup_steps + 1)
        if name == "one_cycle":
            return _cosine(_ONE_CYCLE_START, 1.0, step / warmup_steps)
        return ramp
    if name == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if name == "linear":
        return 1.0 - progress
    return _cosine(1.0, _ONE_CYCLE_END if name == "one_cycle" else 0.0, progress)


@dataclass(frozen=True)
class ScheduleWindow:
    """The updates that a learning-rate curve spans: the whole run, or a phase that starts it anew."""

    start: int
    """Updates done when it begins."""
    end: int
    warmup_steps: int

    @classmethod
    def over(cls, start: int, end: int, *, warmup_steps: float) -> ScheduleWindow:
        """Return a window whose warm-up is in steps, or below 1 a fraction of it."""
        return cls(start, end, resolve_warmup_steps(warmup_steps, end - start))

    def factor(self, name: ScheduleName, step: int) -> float:
        """Return the learning rate of update `step` (from 0, of the run) as a share of the peak."""
        length = self.end - self.start
        return schedule_factor(name, step - self.start, warmup_steps=self.warmup_steps, total_steps=length)


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def get_scheduler(name: ScheduleName, optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int) -> LambdaLR:
    """Return a torch scheduler over `optimizer` with the curve `name`.

    Raises:
        ConfigError: No curve of that name.
    """
    if name not in get_args(ScheduleName):
        allowed = get_args(ScheduleName)
        raise ConfigError(f"no schedule '{name}'.{did_you_mean(name, allowed)} Schedules: {', '.join(allowed)}.")
    return LambdaLR(
        optimizer,
        lambda step: schedule_factor(name, step, warmup_steps=num_warmup_steps, total_steps=num_training_steps),
    )
