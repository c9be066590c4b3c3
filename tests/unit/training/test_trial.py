"""The steps that stand for a run are taken in the run's own passes."""

from __future__ import annotations

import pytest

from smolora.config import SpeedConfig, TrainingConfig
from smolora.data.token_dataset import TokenDataset, build_example
from smolora.training.plan import plan_steps
from smolora.training.trial import Trial
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
