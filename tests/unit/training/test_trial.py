"""The steps that stand for a run are taken in the run's own passes."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from smolora.config import SpeedConfig, TrainingConfig
from smolora.data.token_dataset import TokenDataset, build_example
from smolora.runtime.memory import MemoryManager
from smolora.training.plan import plan_steps
from smolora.training.state import StepRecord, TrainerState
from smolora.training.trial import Room, Trial, TrialWatch
from smolora.training.workload import measure_steps


@pytest.mark.parametrize("speed", [SpeedConfig(), SpeedConfig(max_tokens_per_batch=40)])
def test_a_step_of_the_trial_has_the_passes_of_the_step_it_stands_for(speed):
    rows = TokenDataset([build_example([1] * length, [(1, length)]) for length in range(5, 25)])
    config = TrainingConfig(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    plan = plan_steps(rows.lengths, config, speed)
    trial = Trial.choose(rows, plan, measure_steps(rows, plan, layout="packed"), "packed")
    for number, size in enumerate((*trial.whole, *trial.timed), start=len(trial.parts)):
        expected = plan.micro_batches(size.step)
        assert [list(part) for part in trial.plan.micro_batches(number)] == [list(part) for part in expected]
    assert len(trial.plan.micro_batches(len(trial.parts))) == 2


@dataclass(frozen=True)
class Growing(Room):
    """Memory that takes one size after the other."""

    sizes: list[int] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """The next size."""
        return self.sizes.pop(0)


@dataclass
class Loop:
    """What a watch sees of a trainer."""

    state: TrainerState = field(default_factory=TrainerState)


def watch_steps(peaks, *, seconds):
    """Show a watch steps that each take so long, with these peaks of memory."""
    rows = TokenDataset([build_example([1] * 9, [(1, 9)]) for _ in range(800)])
    plan = plan_steps(rows.lengths, TrainingConfig(), SpeedConfig())
    trial = Trial.choose(rows, plan, measure_steps(rows, plan, layout="packed"), "packed")
    num_before = len(trial.parts) + len(trial.whole)
    watch = TrialWatch(trial, Growing(MemoryManager(torch.device("cpu")), None, sizes=[0] * num_before + peaks))
    loop = Loop()
    for step in range(1, num_before + len(peaks) + 1):
        watch.on_step_end(loop, StepRecord(step, 1.0, 1.0, 1e-3, 8, 9, seconds, ""))
    return watch, loop


def test_the_peak_of_a_longer_run_is_expected_to_grow_by_less_and_less():
    watch, _ = watch_steps([100, 110, 120, 130, 140, 150, 160, 170], seconds=0.1)
    assert watch.expect_growth(8) == 0
    assert watch.expect_growth(16) == 20
    assert watch.expect_growth(32) == 30
    assert watch.expect_growth(4) == 0


@pytest.mark.parametrize(("last", "is_enough"), [(1005, True), (1100, False)])
def test_steps_are_timed_until_the_later_half_of_them_adds_no_memory(last, is_enough):
    _, loop = watch_steps([1000] * 6 + [last] * 4, seconds=2.0)
    assert loop.state.should_stop is is_enough


def test_steps_that_take_a_minute_are_not_timed_eight_times():
    watch, loop = watch_steps([1000], seconds=60.0)
    assert loop.state.should_stop
    assert watch.fit().predict(72) == 60.0
    assert watch.expect_growth(100) == 0


def test_a_pass_of_thousands_of_rows_is_judged_by_a_part_that_takes_seconds():
    rows = TokenDataset([build_example([1] * 9, [(1, 9)]) for _ in range(4000)])
    plan = plan_steps(rows.lengths, TrainingConfig(per_device_train_batch_size=2000), SpeedConfig())
    trial = Trial.choose(rows, plan, measure_steps(rows, plan, layout="packed"), "packed")
    assert [len(part) for part in trial.parts] == [1, 64]
    assert trial.held == (9, 64 * 9, 2000 * 9)


def test_a_typical_step_that_is_the_largest_is_taken_once():
    rows = TokenDataset([build_example([1] * 9, [(1, 9)]) for _ in range(8)])
    plan = plan_steps(rows.lengths, TrainingConfig(per_device_train_batch_size=8, num_train_epochs=1), SpeedConfig())
    trial = Trial.choose(rows, plan, measure_steps(rows, plan, layout="packed"), "packed")
    assert len(trial.whole) == 1
