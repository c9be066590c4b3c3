"""Learning-rate curves are pure functions of the step and never waste an update."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from smolora.config.training import ScheduleName
from smolora.errors import ConfigError
from smolora.training.schedules import get_scheduler, resolve_warmup_steps, schedule_factor

NAMES = get_args(ScheduleName)


def curve(name, warmup, total):
    return [schedule_factor(name, step, warmup_steps=warmup, total_steps=total) for step in range(total)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 10), (3, 10), (9, 10)])
def test_every_update_has_a_positive_rate_of_at_most_the_peak(name, warmup, total):
    assert all(0 < factor <= 1 for factor in curve(name, warmup, total))


@pytest.mark.parametrize("name", NAMES)
def test_the_peak_comes_right_after_warm_up(name):
    assert curve(name, 4, 20)[4] == 1.0


@pytest.mark.parametrize("name", ["linear", "cosine", "one_cycle"])
def test_the_rate_falls_after_the_peak(name):
    tail = curve(name, 4, 20)[4:]
    assert tail == sorted(tail, reverse=True)
    assert tail[-1] < 0.1


def test_warm_up_below_one_is_a_fraction_and_leaves_a_step_at_the_peak():
    assert resolve_warmup_steps(0.1, 500) == 50
    assert resolve_warmup_steps(30, 500) == 30
    assert resolve_warmup_steps(30, 10) == 9
    assert resolve_warmup_steps(0.1, 1) == 0


def test_get_scheduler_sets_the_same_curve_on_an_optimizer():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=6)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"] / 2.0)
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(curve("cosine", 2, 6))


def test_an_unknown_schedule_names_the_nearest():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ConfigError, match="Did you mean 'cosine'"):
        get_scheduler("cosin", optimizer, 0, 10)
