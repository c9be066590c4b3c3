"""Which rows a step sees is a pure function of seed and step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolora.config import SpeedConfig, TrainingConfig
from smolora.errors import ConfigError
from smolora.training.plan import ChosenSteps, StepPlan, pack_best_fit, plan_steps


def rows_of(steps, step):
    """Return the rows of an update, over all processes."""
    parts = [steps.micro_batches(step, process) for process in range(steps.num_processes)]
    return np.concatenate([rows for passes in parts for rows in passes])


def plan(num_rows=10, processes=1, **settings):
    config = TrainingConfig(per_device_train_batch_size=2, gradient_accumulation_steps=2, **settings)
    return StepPlan(num_rows, config, processes)


def test_an_epoch_sees_every_row_once_and_the_last_group_is_smaller():
    groups = [rows_of(plan(), step) for step in range(3)]
    assert [len(group) for group in groups] == [4, 4, 2]
    assert sorted(np.concatenate(groups)) == list(range(10))


def test_each_epoch_has_its_own_order():
    first, second = (np.concatenate([rows_of(plan(), e * 3 + s) for s in range(3)]) for e in range(2))
    assert list(first) != list(second)
    assert sorted(second) == list(range(10))


def test_a_step_does_not_depend_on_the_steps_asked_before():
    walked = plan()
    for step in range(7):
        rows_of(walked, step)
    assert list(rows_of(walked, 7)) == list(rows_of(plan(), 7))


def test_another_seed_gives_another_order():
    assert list(rows_of(plan(seed=1), 0)) != list(rows_of(plan(seed=2), 0))


def test_micro_batches_are_the_rows_of_the_step():
    batches = plan().micro_batches(0)
    assert [len(batch) for batch in batches] == [2, 2]
    assert list(np.concatenate(batches)) == list(rows_of(plan(), 0))


def test_processes_share_the_rows_of_a_step():
    both = plan(num_rows=16, processes=2)
    rows = [np.concatenate(both.micro_batches(0, process)) for process in range(2)]
    assert sorted(np.concatenate(rows)) == sorted(rows_of(both, 0))


@pytest.mark.parametrize(("settings", "steps"), [({}, 3), ({"num_train_epochs": 2.5}, 8), ({"max_steps": 2}, 2)])
def test_max_steps_decides_alone_otherwise_epochs_do(settings, steps):
    assert plan(**settings).total_steps == steps


def test_an_evaluation_comes_as_set_or_five_times_in_the_run():
    assert [plan(eval_steps=3, max_steps=20).eval_steps, plan(max_steps=21).eval_steps] == [3, 5]


def test_chosen_steps_see_the_rows_they_are_given():
    chosen = ChosenSteps(10, plan().config, steps=[[np.array([7])], [np.array([1, 2]), np.array([3])]])
    assert chosen.total_steps == 2
    assert [list(rows) for rows in chosen.micro_batches(1)] == [[1, 2], [3]]
    assert list(rows_of(chosen, 1)) == [1, 2, 3]


def random_lengths(count, *, seed=0):
    return np.random.default_rng(seed).integers(1, 100, count).tolist()


def budget_plan(lengths, *, processes=1, **settings):
    config = TrainingConfig(gradient_accumulation_steps=2, **settings)
    return plan_steps(np.array(lengths, dtype=np.int64), config, SpeedConfig(max_tokens_per_batch=200), processes)


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(0, 5))
def test_best_fit_takes_every_row_once_and_keeps_to_the_budget(lengths, seed):
    passes = pack_best_fit(lengths, 50, seed=seed)
    assert sorted(row for rows in passes for row in rows) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in rows) <= 50 for rows in passes)
    # No two passes would fit into one: a row that starts a pass fitted into no other.
    sums = sorted(sum(lengths[row] for row in rows) for rows in passes)
    assert len(sums) < 2 or sums[0] + sums[1] > 50


def test_best_fit_leaves_little_room():
    lengths = random_lengths(2_000)
    passes = pack_best_fit(lengths, 512, seed=0)
    assert sum(lengths) / (512 * len(passes)) > 0.98


def test_a_budget_of_tokens_sees_every_row_once_an_epoch():
    lengths = random_lengths(101)
    steps = budget_plan(lengths)
    for epoch in range(2):
        rows = [rows_of(steps, epoch * steps.steps_per_epoch + step) for step in range(steps.steps_per_epoch)]
        assert sorted(np.concatenate(rows)) == list(range(101))
    first, second = rows_of(steps, 0), rows_of(steps, steps.steps_per_epoch)
    assert sorted(first) != sorted(second)


def test_a_step_has_as_many_passes_as_it_accumulates_and_none_exceeds_the_budget():
    lengths = np.array(random_lengths(101))
    steps = budget_plan(lengths)
    passes = [steps.micro_batches(step) for step in range(steps.steps_per_epoch)]
    assert {len(parts) for parts in passes[:-1]} == {2}
    assert all(lengths[rows].sum() <= 200 for parts in passes for rows in parts)


def test_processes_share_the_passes_of_a_step():
    steps = budget_plan(random_lengths(160), processes=2)
    parts = [steps.micro_batches(0, process) for process in range(2)]
    assert [len(part) for part in parts] == [2, 2]
    assert sorted(np.concatenate([*parts[0], *parts[1]])) == sorted(rows_of(steps, 0))


def test_a_row_beyond_the_budget_is_refused_with_what_to_do():
    with pytest.raises(ConfigError, match=r"max_tokens_per_batch=200: a row has 201 tokens.*data\.max_length=200"):
        budget_plan([5, 201])


def test_rows_grouped_by_length_differ_less_within_a_step():
    lengths = np.array(random_lengths(400))

    def spread(**settings):
        config = TrainingConfig(per_device_train_batch_size=8)
        steps = plan_steps(lengths, config, SpeedConfig(**settings))
        return np.mean([np.ptp(lengths[rows_of(steps, step)]) for step in range(50)])

    assert spread(group_by_length=True) < spread() / 10


def test_grouping_by_length_sees_every_row_once_an_epoch_in_another_order():
    config = TrainingConfig(per_device_train_batch_size=8)
    steps = plan_steps(np.array(random_lengths(403)), config, SpeedConfig(group_by_length=True))
    epochs = [[rows_of(steps, epoch * 51 + step) for step in range(51)] for epoch in range(2)]
    assert all(sorted(np.concatenate(rows)) == list(range(403)) for rows in epochs)
    assert [len(rows) for rows in epochs[0]] == [8] * 50 + [3]
    assert list(epochs[0][0]) != list(epochs[1][0])


def test_a_last_step_may_leave_a_process_without_a_row():
    both = plan(num_rows=9, processes=2)
    assert [len(both.micro_batches(1, process)) for process in range(2)] == [1, 0]


def test_rows_of_a_step_do_not_depend_on_the_number_of_processes():
    alone = StepPlan(9, TrainingConfig(per_device_train_batch_size=4))
    both = StepPlan(9, TrainingConfig(per_device_train_batch_size=2), 2)
    assert [sorted(rows_of(alone, step)) for step in range(5)] == [sorted(rows_of(both, step)) for step in range(5)]


def test_passes_are_made_in_one_way():
    with pytest.raises(ConfigError, match="give one"):
        SpeedConfig(max_tokens_per_batch=100, group_by_length=True)
