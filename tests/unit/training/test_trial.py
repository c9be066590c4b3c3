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
from smolora.training.trial import Room, Trial, TrialWatch, WontFitError
from smolora.training.workload import measure_steps


@pytest.mark.parametrize("speed", [SpeedConfig(), SpeedConfig(max_tokens_per_batch=40)])
def test_a_step_of_the_trial_has_the_passes_of_the_step_it_stands_for(speed):
    rows = TokenDataset([build_example([1] * length, [(1, length)]) for length in range(5, 25)])
    config = TrainingConfig(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    plan = plan_steps(rows.lengths, config, speed)
    trial = Trial.choose(rows, plan, measure_steps(rows, plan, layout="packed"), "packed")
    num_parts = len(trial.ladder.parts)
    for number, size in enumerate((*trial.whole, *trial.timed), start=num_parts):
        expected = plan.micro_batches(size.step)
        assert [list(part) for part in trial.plan.micro_batches(number)] == [list(part) for part in expected]
    assert len(trial.plan.micro_batches(num_parts)) == 2


@dataclass(frozen=True)
class Growing(Room):
    """Memory that takes one size after the other."""

    sizes: list[int] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """The next size, and the last one for ever."""
        return self.sizes.pop(0) if len(self.sizes) > 1 else self.sizes[0]


@dataclass
class Loop:
    """What a watch sees of a trainer."""

    state: TrainerState = field(default_factory=TrainerState)


def watch_steps(peaks, *, seconds_per_row, batch_size=8, accumulation=1, available=None):
    """Show a watch the steps of its trial for as long as it wants any, with these peaks of memory."""
    rows = TokenDataset([build_example([1] * length, [(1, length)]) for length in [8] + [9] * 799])
    config = TrainingConfig(per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation)
    plan = plan_steps(rows.lengths, config, SpeedConfig())
    trial = Trial.choose(rows, plan, measure_steps(rows, plan, layout="packed"), "packed")
    watch = TrialWatch(trial, Growing(MemoryManager(torch.device("cpu")), available, sizes=list(peaks)), patience=80.0)
    loop, counts = Loop(), []
    while not loop.state.should_stop:
        counts.append(sum(map(len, trial.plan.micro_batches(len(counts)))))
        seconds = seconds_per_row * counts[-1]
        watch.on_step_end(loop, StepRecord(len(counts), 1.0, 1.0, 1e-3, 8, 9, seconds, ""))
    return watch, counts


def test_an_ordinary_step_is_run_whole_after_two_parts():
    watch, counts = watch_steps([100], seconds_per_row=0.125)
    assert counts == [1, 2] + [8] * 10
    assert watch.fit().predict(72) == 1.0
    assert watch.typical_peak == 100


def test_the_peak_of_a_longer_run_is_expected_to_grow_by_less_and_less():
    watch, counts = watch_steps([100] * 4 + [100, 110, 120, 130, 140, 150], seconds_per_row=1.0)
    assert len(counts) == 4 + 6
    assert watch.expect_peak(3) == watch.expect_peak(6) == 150
    assert watch.expect_peak(12) == 150 + 15
    assert watch.expect_peak(24) == 150 + 22


@pytest.mark.parametrize(("last", "num_timed"), [(1005, 8), (1100, 9)])
def test_steps_are_timed_until_the_later_half_of_them_adds_no_memory(last, num_timed):
    _, counts = watch_steps([1000] * 8 + [last], seconds_per_row=0.125)
    assert len(counts) == 4 + num_timed


def test_a_step_of_twenty_seconds_is_still_run_whole_and_timed_until_there_is_no_more_patience():
    watch, counts = watch_steps([100], seconds_per_row=2.5)
    assert counts == [1, 2] + [8] * 2 + [8] * 3
    assert watch.fit().predict(72) == 20.0
    assert watch.expect_peak(100) == 100


def test_a_step_that_would_take_minutes_is_expected_from_parts_and_the_largest_is_run_twice(caplog):
    caplog.set_level("INFO")
    watch, counts = watch_steps([1000, 2136, 3286, 3615], seconds_per_row=0.075, batch_size=800)
    assert counts == [1, 64, 128, 128]
    assert watch.fit().predict(7199) == pytest.approx(60, rel=0.01)
    assert watch.expect_peak(1) == pytest.approx(1.1 * (1000 + 2 * 7191), rel=0.01)
    assert watch.typical_peak is None
    assert "measuring parts of a step: 1,151 of 7,199 tokens took 9.6 s" in caplog.text


def test_many_short_passes_that_take_minutes_are_run_whole_but_not_all_of_them():
    watch, counts = watch_steps([100, 200, 300, 400], seconds_per_row=0.11, batch_size=8, accumulation=100)
    assert counts == [1, 2, 4, 8, 16, 32, 64, 64]
    assert watch.expect_peak(1) == 400


def test_a_larger_part_decides_where_two_small_ones_say_that_a_pass_does_not_fit():
    peaks = [1000, 5000, 5500, 6500, 8500, 8500, 8500]
    watch, counts = watch_steps(peaks, seconds_per_row=0.01, batch_size=800, available=20_000)
    assert counts[:4] == [1, 64, 128, 800]
    assert watch.kind == "whole steps"


def test_what_does_not_fit_is_refused_before_it_is_run():
    with pytest.raises(WontFitError) as caught:
        watch_steps([1000, 2136, 3286, 5590], seconds_per_row=0.01, batch_size=800, available=8000)
    assert caught.value.peak == pytest.approx(1000 + 2 * 7191, rel=0.01)


def test_a_step_that_took_more_than_there_is_ends_the_trial():
    with pytest.raises(WontFitError) as caught:
        watch_steps([100, 200, 500, 900], seconds_per_row=0.01, available=800)
    assert caught.value.peak == 900


def test_a_typical_step_that_is_the_largest_is_taken_once():
    rows = TokenDataset([build_example([1] * 9, [(1, 9)]) for _ in range(8)])
    plan = plan_steps(rows.lengths, TrainingConfig(per_device_train_batch_size=8, num_train_epochs=1), SpeedConfig())
    trial = Trial.choose(rows, plan, measure_steps(rows, plan, layout="packed"), "packed")
    assert len(trial.whole) == 1
