"""A few steps of a run, taken to see what the whole of it needs: which steps, and what is measured in them.

Parts of a step come first. Where a whole one is expected to fit, and not to take minutes, whole steps follow, and what
they take is what counts. Where it would take minutes, the parts decide.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from smolora.data.collate import Layout
from smolora.data.token_dataset import TokenDataset
from smolora.runtime.memory import MemoryManager
from smolora.training.callback import Callback
from smolora.training.plan import ChosenSteps, StepPlan
from smolora.training.trial_parts import Ladder
from smolora.training.workload import StepSize, StepTime, find_largest, find_typical, sample_steps

if TYPE_CHECKING:
    from smolora.training.state import StepRecord
    from smolora.training.trainer import Trainer

logger = logging.getLogger(__name__)

_FEWEST, _MOST = 8, 256
"""How many steps are timed, where there is the patience."""
_SECONDS, _PATIENCE = 8.0, 40.0
"""How long steps are timed: the shorter where memory stands still by then."""
_STANDING_STILL = 0.01
"""Memory grows with every new shape for a hundred steps or more (measured: 640 to 1,600 MiB with a model of 260,000
parameters; oneDNN's cache of kernels is half of it). It stands still where the later half of the steps adds no more
than 1 %; the first of the new shapes also take longer."""


class WontFitError(Exception):
    """The largest step is expected to take more memory than there is and was not run, or something else took more."""

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

    def can_hold(self, size: int) -> bool:
        """Whether so many bytes in all are there, as far as anybody knows."""
        return self.available is None or size <= self.available

    @property
    def peak(self) -> int:
        """Most bytes held so far."""
        usage = self.memory.get_memory_usage()
        return usage.device_peak if self.memory.device.type == "cuda" else usage.process_peak


@dataclass(frozen=True)
class Trial:
    """The steps to take: parts of one, a typical step, the largest ones, and those that are timed."""

    ladder: Ladder
    most_held: int
    """Tokens that the largest pass of the run holds."""
    whole: list[StepSize]
    """A typical step, then the largest, each once."""
    timed: list[StepSize]
    plan: ChosenSteps
    """Parts, whole steps and timed ones, as many as there can be: the watch leaves out what isn't needed."""

    @classmethod
    def choose(cls, dataset: TokenDataset, plan: StepPlan, sizes: Sequence[StepSize], layout: Layout) -> Trial:
        """Choose steps of a run by their sizes."""
        ladder = Ladder.choose(dataset, plan, sizes, layout)
        whole = list(dict.fromkeys((find_typical(sizes), *find_largest(sizes))))
        timed = sample_steps(sizes, max(_FEWEST, min(_MOST, len(sizes))))
        steps = [*(part.passes for part in ladder.parts), *(plan.micro_batches(size.step) for size in (*whole, *timed))]
        chosen = ChosenSteps(plan.num_units, plan.config, steps=steps)
        return cls(ladder, max(size.held for size in whole), whole, timed, chosen)

    @property
    def whole_tokens(self) -> int:
        """Input tokens of every whole step, and of one that is timed."""
        return sum(size.tokens for size in self.whole) + self.timed[0].tokens

    def go_on_with_whole_steps(self) -> None:
        """Leave out the parts that weren't run."""
        del self.plan.steps[len(self.ladder.runs) : len(self.ladder.parts)]

    def end_with_the_last_part(self) -> None:
        """Run the last part once more, and nothing after it."""
        self.plan.steps[len(self.ladder.runs) :] = [self.ladder.last.part.passes]


class TrialWatch(Callback):
    """Times the steps of a trial; the larger ones run only where they are expected to fit.

    It must come last among the callbacks, so that what the others do is not counted as evaluation or checkpoint.
    """

    def __init__(self, trial: Trial, room: Room, patience: float) -> None:
        self.trial = trial
        self.room = room
        self.patience = patience
        """Seconds for a typical step, the largest and one that is timed. Where they need more, parts stand for them."""
        self.seconds: list[float] = []
        """Of the steps that were timed."""
        self.evaluation = self.checkpoint = 0.0
        """Seconds of the last one."""
        self.kind: Literal["parts", "last part", "whole steps"] = "parts"
        """What is run now: the last part is run once more where parts stand for whole steps."""
        self._peaks: list[int] = []
        """Bytes, after each whole step."""
        self._moment = 0.0

    @property
    def typical_peak(self) -> int | None:
        """Bytes; None where no whole step was run."""
        return self._peaks[0] if self._peaks else None

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        match self.kind:
            case "parts":
                self.trial.ladder.add(record.seconds, self.room.peak)
                if len(self.trial.ladder.runs) > 1:
                    self._choose_what_follows()
            case "last part":
                self.trial.ladder.add_again(record.seconds, self.room.peak)
                self._require_fit()
                trainer.state.should_stop = True
            case "whole steps":
                self._peaks.append(self.room.peak)
                self._require_room(self._peaks[-1])
                if len(self._peaks) > len(self.trial.whole):
                    self.seconds.append(record.seconds)
                    trainer.state.should_stop = len(self.seconds) == len(self.trial.timed) or self._has_seen_enough()
        self._moment = time.perf_counter()

    def on_evaluate(self, trainer: Trainer, eval_loss: float) -> None:
        self.evaluation = time.perf_counter() - self._moment
        self._require_room(self.room.peak)

    def on_log(self, trainer: Trainer, record: StepRecord) -> None:
        self._moment = time.perf_counter()

    def on_save(self, trainer: Trainer) -> None:
        self.checkpoint = time.perf_counter() - self._moment

    def fit(self) -> StepTime:
        """Return what a step takes."""
        if self.kind == "last part":
            return StepTime(0.0, self.trial.ladder.expect_seconds(1))
        timed = self.trial.timed[: len(self.seconds)]
        return StepTime.fit([size.tokens for size in timed], self.seconds)

    def expect_peak(self, num_steps: int) -> int:
        """Return the bytes that a run of so many steps holds at most.

        Shapes that are new get fewer: each doubling of the steps is taken to add half of what the one before it did.
        """
        if self.kind == "last part":
            return max(self.room.peak, self.trial.ladder.expect_peak(self.trial.most_held))
        doublings = math.log2(num_steps / len(self.seconds))
        return self.room.peak + round(max(0.0, 1 - math.exp2(-doublings)) * self._added_by_half())

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

    def _choose_what_follows(self) -> None:
        """Go on with a larger part while what is known leaves a doubt of whole steps."""
        ladder = self.trial.ladder
        can_grow = ladder.can_grow(self.room.available)
        fits = self.room.can_hold(ladder.expect_peak(self.trial.most_held))
        is_short = ladder.expect_seconds(self.trial.whole_tokens) <= self.patience
        if fits and is_short and (ladder.is_enough or not can_grow):
            self.kind = "whole steps"
            self.trial.go_on_with_whole_steps()
            logger.info("measuring whole steps, of about %.2g s", ladder.expect_seconds(self.trial.whole[0].tokens))
            return
        if ladder.is_enough or not can_grow:
            logger.info("measuring parts of a step: %s", self._describe_last_part())
        if not can_grow:
            self._require_fit()
            self.kind = "last part"
            self.trial.end_with_the_last_part()

    def _require_fit(self) -> None:
        self._require_room(self.trial.ladder.expect_peak(self.trial.most_held))

    def _require_room(self, size: int) -> None:
        if not self.room.can_hold(size):
            raise WontFitError(size)

    def _describe_last_part(self) -> str:
        last, whole = self.trial.ladder.last, self.trial.whole[0].tokens
        return f"{last.part.tokens:,} of {whole:,} tokens took {last.seconds:.1f} s and {last.peak / 2**20:,.0f} MiB"
