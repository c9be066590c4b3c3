"""Parts of a step grow, and what they take says what a whole one would."""

from __future__ import annotations

import numpy as np
import pytest

from smolora.config import SpeedConfig, TrainingConfig
from smolora.data.token_dataset import TokenDataset, build_example
from smolora.training.plan import plan_steps
from smolora.training.trial_parts import Ladder
from smolora.training.workload import measure_steps


def choose(lengths, *, layout="packed", group_by_length=False, **settings):
    rows = TokenDataset([build_example([1] * length, [(1, length)]) for length in lengths])
    plan = plan_steps(rows.lengths, TrainingConfig(**settings), SpeedConfig(group_by_length=group_by_length))
    return Ladder.choose(rows, plan, measure_steps(rows, plan, layout=layout), layout), rows


def count_rows(ladder):
    return [[len(rows) for rows in part.passes] for part in ladder.parts]


def test_parts_grow_from_the_shortest_row_over_few_tokens_to_the_whole_step():
    ladder, rows = choose([100] * 999 + [40], per_device_train_batch_size=1000)
    assert count_rows(ladder) == [[1], [10], [20], [40], [64], [128], [256], [512], [1000]]
    assert ladder.parts[0].tokens == 40
    assert ladder.parts[-1].tokens == rows.num_input_tokens
    assert ladder.enough == 5


def test_a_quarter_of_a_pass_is_enough_where_it_has_few_tokens():
    ladder, _ = choose([9] * 79 + [8], per_device_train_batch_size=8)
    assert count_rows(ladder)[: ladder.enough] == [[1], [2]]


def test_a_row_of_many_tokens_is_a_part_of_its_own():
    ladder, _ = choose([3000] * 32 + [2000], per_device_train_batch_size=16)
    assert count_rows(ladder)[: ladder.enough] == [[1], [1], [2], [4]]


def test_larger_parts_begin_with_the_largest_pass_of_the_run_and_go_on_in_the_passes_of_a_step():
    lengths = [5] * 63 + [90]
    ladder, rows = choose(lengths, per_device_train_batch_size=4, gradient_accumulation_steps=4, num_train_epochs=1)
    assert count_rows(ladder) == [[1], [1], [2], [4], [4, 4], [4, 4, 4, 4]]
    assert 63 in ladder.parts[3].passes[0]
    assert ladder.parts[3].held == 90 + 3 * 5
    assert ladder.parts[-1].tokens == rows.lengths[np.concatenate(ladder.parts[-1].passes)].sum()


def test_a_part_has_rows_from_all_over_a_sorted_pass():
    ladder, rows = choose(range(3, 403), group_by_length=True, per_device_train_batch_size=400)
    (taken,) = ladder.parts[3].passes
    assert rows.lengths[taken].mean() == pytest.approx(rows.lengths.mean(), rel=0.01)


def test_padding_counts_as_held():
    ladder, _ = choose([10, 20, 30, 40] * 4, layout="padded", per_device_train_batch_size=16)
    assert (ladder.parts[-1].tokens, ladder.parts[-1].held) == (400, 640)


def test_memory_and_time_follow_the_last_parts_with_the_growth_of_one_that_is_run_again():
    ladder, _ = choose([100] * 1000, per_device_train_batch_size=1000)
    for part in ladder.parts[:6]:
        ladder.add(part.tokens / 1000, 5000 + 3 * part.tokens)
    assert ladder.bytes_per_token == 3
    assert ladder.expect_peak(100_000) == 305_000
    assert ladder.expect_peak(1) == 5000 + 3 * 12_800
    assert ladder.expect_seconds(100_000) == 100
    ladder.add_again(6.4, 2 * (5000 + 3 * 12_800))
    assert ladder.expect_peak(100_000) == 610_000
    assert ladder.expect_seconds(100_000) == 50


def test_a_part_that_was_held_up_when_it_was_run_again_counts_as_it_was():
    ladder, _ = choose([100] * 999 + [40], per_device_train_batch_size=1000)
    ladder.add(1.0, 5000)
    ladder.add(2.0, 5000)
    ladder.add_again(50.0, 5000)
    assert ladder.last.seconds == 2.0


@pytest.mark.parametrize(
    ("seconds_a_row", "available", "can_grow"),
    [(0.08, None, True), (0.08, 11_999, False), (0.08, 12_100, True), (0.1, None, False)],
)
def test_parts_grow_while_there_is_the_patience_and_the_memory_for_the_next(seconds_a_row, available, can_grow):
    ladder, _ = choose([10] * 1000, per_device_train_batch_size=1000)
    for rows, part in zip((1, 64), ladder.parts, strict=False):
        ladder.add(rows * seconds_a_row, 4000 + part.held * 8000 // 1280)
    assert len(ladder.parts[2].passes[0]) == 128
    assert ladder.can_grow(available) is can_grow


def test_rows_of_one_length_are_not_enough_before_a_pass_has_several():
    ladder, _ = choose([9] * 80, per_device_train_batch_size=4)
    for is_enough in (False, False, True):
        ladder.add(1.0, 100)
        assert ladder.is_enough is is_enough
