"""What every step of a run holds, which are the largest, and the line through their times."""

from __future__ import annotations

import numpy as np
import pytest

from smolora.config import TrainingConfig
from smolora.data.token_dataset import TokenDataset, build_example
from smolora.training.plan import StepPlan
from smolora.training.workload import StepTime, find_largest, measure_steps, sample_steps


def dataset(*lengths, targets=1):
    return TokenDataset([build_example([1] * length, [(length - targets, length)]) for length in lengths])


def steps(rows, *, layout="packed", first=0, **settings):
    config = TrainingConfig(**{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **settings})
    return measure_steps(rows, StepPlan(len(rows), config), layout=layout, first=first)


def test_the_steps_of_an_epoch_hold_all_of_its_tokens():
    rows = dataset(*range(3, 14))
    sizes = steps(rows)
    assert [size.step for size in sizes] == [0, 1, 2]
    assert sum(size.tokens for size in sizes) == rows.num_input_tokens


def test_only_what_is_left_of_a_run_is_counted():
    rows = dataset(*range(3, 14))
    assert steps(rows, first=1) == steps(rows)[1:]


def test_padding_is_held_but_is_no_token():
    (size,) = steps(dataset(4, 10), layout="padded")
    assert (size.tokens, size.held) == (14, 20)
    (size,) = steps(dataset(4, 10))
    assert (size.tokens, size.held) == (14, 14)


def test_the_largest_passes_are_found_by_tokens_targets_and_squares():
    rows = TokenDataset([build_example([1] * n, [(n - t, n)]) for n, t in [(9, 1), (9, 1), (9, 1), (20, 1), (12, 11)]])
    sizes = steps(rows, per_device_train_batch_size=1, gradient_accumulation_steps=1)
    largest = find_largest(sizes)
    assert {(size.held, size.targets, size.squares) for size in largest} == {(20, 1, 400), (12, 11, 144)}


def test_a_sample_takes_as_many_steps_from_each_part_of_the_range():
    sizes = steps(dataset(*range(3, 103)), per_device_train_batch_size=1, gradient_accumulation_steps=1)
    tokens = [size.tokens for size in sample_steps(sizes, 10)]
    assert sorted(tokens) == list(range(8, 103, 10))
    assert tokens != sorted(tokens)


def test_a_sample_of_a_shorter_run_repeats_its_steps():
    sizes = steps(dataset(5, 6))
    assert sample_steps(sizes, 3) == sizes * 3


@pytest.mark.parametrize(
    ("tokens", "seconds", "expected"),
    [
        ([100, 200, 300], [0.2, 0.3, 0.4], (0.1, 0.001)),
        ([100, 100], [0.2, 0.4], (0.3, 0.0)),
        ([100, 300], [0.4, 0.2], (0.3, 0.0)),  # Noise; no step is quicker for having more tokens.
        ([100, 300], [0.1, 0.5], (0.0, 0.0015)),  # Noise; no step begins before it starts.
    ],
)
def test_the_line_keeps_the_mean_and_has_no_part_below_zero(tokens, seconds, expected):
    fit = StepTime.fit(tokens, seconds)
    assert (fit.fixed, fit.per_token) == pytest.approx(expected)
    assert np.mean([fit.predict(count) for count in tokens]) == pytest.approx(np.mean(seconds))
