"""Which rows a step sees is a pure function of seed and step."""

from __future__ import annotations

import numpy as np
import pytest

from smolora.config import TrainingConfig
from smolora.training.plan import ChosenSteps, StepPlan


def plan(num_rows=10, processes=1, **settings):
    config = TrainingConfig(per_device_train_batch_size=2, gradient_accumulation_steps=2, **settings)
    return StepPlan(num_rows, config, processes)


def test_an_epoch_sees_every_row_once_and_the_last_group_is_smaller():
    groups = [plan().rows_of(step) for step in range(3)]
    assert [len(group) for group in groups] == [4, 4, 2]
    assert sorted(np.concatenate(groups)) == list(range(10))


def test_each_epoch_has_its_own_order():
    first, second = (np.concatenate([plan().rows_of(e * 3 + s) for s in range(3)]) for e in range(2))
    assert list(first) != list(second)
    assert sorted(second) == list(range(10))


def test_a_step_does_not_depend_on_the_steps_asked_before():
    walked = plan()
    for step in range(7):
        walked.rows_of(step)
    assert list(walked.rows_of(7)) == list(plan().rows_of(7))


def test_another_seed_gives_another_order():
    assert list(plan(seed=1).rows_of(0)) != list(plan(seed=2).rows_of(0))


def test_micro_batches_are_the_rows_of_the_step():
    batches = plan().micro_batches(0)
    assert [len(batch) for batch in batches] == [2, 2]
    assert list(np.concatenate(batches)) == list(plan().rows_of(0))


def test_processes_share_the_rows_of_a_step():
    both = plan(num_rows=16, processes=2)
    rows = [np.concatenate(both.micro_batches(0, process)) for process in range(2)]
    assert sorted(np.concatenate(rows)) == sorted(both.rows_of(0))


@pytest.mark.parametrize(("settings", "steps"), [({}, 3), ({"num_train_epochs": 2.5}, 8), ({"max_steps": 2}, 2)])
def test_max_steps_decides_alone_otherwise_epochs_do(settings, steps):
    assert plan(**settings).total_steps == steps


def test_an_evaluation_comes_as_set_or_five_times_in_the_run():
    assert [plan(eval_steps=3, max_steps=20).eval_steps, plan(max_steps=21).eval_steps] == [3, 5]


def test_chosen_steps_see_the_rows_they_are_given():
    groups = [np.array([7]), np.array([1, 2, 3])]
    chosen = ChosenSteps(10, plan().config, groups=groups)
    assert chosen.total_steps == 2
    assert [list(rows) for rows in chosen.micro_batches(1)] == [[1, 2], [3]]
