"""A few steps of a run, taken to see what the whole of it needs: which steps, and what is measured in them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from smolora.data.collate import Layout
from smolora.data.token_dataset import TokenDataset
from smolora.runtime.memory import MemoryManager
from smolora.training.callback import Callback
from smolora.training.plan import ChosenSteps, StepPlan
from smolora.training.workload import StepSize, StepTime, count_held, find_largest, sample_steps

if TYPE_CHECKING:
    from smolora.training.state import StepRecord
    from smolora.training.trainer import Trainer

_FEWEST, _MOST = 8, 256
"""How many steps are timed, where there is the patience."""
_SECONDS, _PATIENCE = 8.0, 40.0
"""How long steps are timed: the shorter where memory stands still by then."""
_PART_ROWS = 64
"""Of the larger part of a pass: a quarter of one of thousands takes minutes."""
_STANDING_STILL = 0.01
"""Memory grows with every new shape for a hundred steps or more (measured: 640 to 1,600 MiB with a model of 260,000
parameters; oneDNN's cache of kernels is half of it). It stands still where the later half of the steps adds no more
than 1 %; the first of the new shapes also take longer."""


class WontFitError(Exception):
    """The largest step is expected to take more memory than there is, and was not run."""

    def __init__(self, peak: int) -> None:
        super().__init__(f"{peak} bytes")
        self.peak = peak


@dataclass(frozen=True)
class Room:
    """The memory of a run's tensors: the GPU's, else the process's."""

    memory: MemoryManager
    available: int | None
    """Bytes that may be held in all; None if unknown."""

    @classmethod
    def look(cls, device: torch.device) -> Room:
        """Count what is free now and what this process holds already."""
        memory = MemoryManager(device)
        free = memory.get_available_memory()
        held = 0 if device.type == "cuda" else memory.get_memory_usage().process
        return cls(memory, None if free is None else free + held)

    @property
    def peak(self) -> int:
        """Most bytes held so far."""
        usage = self.memory.get_memory_usage()
        return usage.device_peak if self.memory.device.type == "cuda" else usage.process_peak


@dataclass(frozen=True)
class Trial:
    """The steps to take: two parts of a pass, a typical step, the largest ones, and those that are timed."""

    parts: list[np.ndarray]
    """Rows of the two parts: the shortest row, and up to a quarter of a typical pass."""
    held: tuple[int, int, int]
    """Tokens that the two parts hold, and the largest pass of the run."""
    whole: list[StepSize]
    """A typical step, then the largest, each once."""
    timed: list[StepSize]
    plan: ChosenSteps

    @classmethod
    def choose(cls, dataset: TokenDataset, plan: StepPlan, sizes: Sequence[StepSize], layout: Layout) -> Trial:
        """Choose steps of a run by their sizes."""
        typical = sorted(sizes, key=lambda size: size.tokens)[len(sizes) // 2]
        whole = list(dict.fromkeys((typical, *find_largest(sizes))))
        one_pass = plan.micro_batches(typical.step)[0]
        parts = [np.array([dataset.lengths.argmin()]), one_pass[: min(max(1, len(one_pass) // 4), _PART_ROWS)]]
        first, second = (count_held(dataset.lengths[part], layout) for part in parts)
        timed = sample_steps(sizes, max(_FEWEST, min(_MOST, len(sizes))))
        steps = [*([part] for part in parts), *(plan.micro_batches(size.step) for size in (*whole, *timed))]
        chosen = ChosenSteps(plan.num_units, plan.config, steps=steps)
        return cls(parts, (first, second, max(size.held for size in whole)), whole, timed, chosen)


class TrialWatch(Callback):
    """Times the steps of a trial; the larger ones run only where they are expected to fit.

    It must come last among the callbacks, so that what the others do is not counted as evaluation or checkpoint.
    """

    def __init__(self, trial: Trial, room: Room) -> None:
        self.trial = trial
        self.room = room
        self.seconds: list[float] = []
        """Of the steps that were timed."""
        self.evaluation = self.checkpoint = 0.0
        """Seconds of the last one."""
        self.typical_peak = 0
        """Bytes."""
        self._peaks: list[int] = []
        self._moment = 0.0

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        self._peaks.append(self.room.peak)
        num_parts = len(self.trial.parts)
        if record.step == num_parts:
            self._expect_the_largest()
        if record.step == num_parts + 1:
            self.typical_peak = self._peaks[-1]
        if record.step > num_parts + len(self.trial.whole):
            self.seconds.append(record.seconds)
            trainer.state.should_stop = self._has_seen_enough()
        self._moment = time.perf_counter()

    def on_evaluate(self, trainer: Trainer, eval_loss: float) -> None:
        self.evaluation = time.perf_counter() - self._moment

    def on_log(self, trainer: Trainer, record: StepRecord) -> None:
        self._moment = time.perf_counter()

    def on_save(self, trainer: Trainer) -> None:
        self.checkpoint = time.perf_counter() - self._moment

    def fit(self) -> StepTime:
        """Return what a step takes."""
        timed = self.trial.timed[: len(self.seconds)]
        return StepTime.fit([size.tokens for size in timed], self.seconds)

    def expect_growth(self, num_steps: int) -> int:
        """Return the bytes that the peak still grows by in a run of so many steps.

        Shapes that are new get fewer: each doubling of the steps is taken to add half of what the one before it did.
        """
        doublings = math.log2(num_steps / len(self.seconds))
        return round(max(0.0, 1 - math.exp2(-doublings)) * self._added_by_half())

    def _added_by_half(self) -> int:
        """Return the bytes that the later half of the timed steps added to the peak."""
        return self._peaks[-1] - self._peaks[-1 - len(self.seconds) // 2]

    def _has_seen_enough(self) -> bool:
        spent = sum(self.seconds)
        if spent > _PATIENCE:
            return True
        if len(self.seconds) < _FEWEST or spent < _SECONDS:
            return False
        return self._added_by_half() <= _STANDING_STILL * self._peaks[-1]

    def _expect_the_largest(self) -> None:
        less, more, most = self.trial.held
        before, now = self._peaks
        per_token = (now - before) / max(1, more - less)
        expected = now + math.ceil(per_token * max(0, most - more))
        if self.room.available is not None and expected > self.room.available:
            raise WontFitError(expected)
