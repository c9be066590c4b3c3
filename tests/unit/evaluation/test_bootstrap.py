"""Intervals by the Poisson bootstrap."""

from __future__ import annotations

import numpy as np
import pytest

from smolora.evaluation.bootstrap import Tally, find_interval


def tally(values, **settings):
    made = Tally(2, **settings)
    for value in values:
        made.add(np.array([value, 1.0]))
    return made


def test_it_agrees_with_the_usual_bootstrap():
    values = np.random.default_rng(1).random(400)
    made = tally(values)
    low, high = find_interval(made.resampled[:, 0] / made.resampled[:, 1])
    usual = values[np.random.default_rng(2).integers(0, 400, (4000, 400))].mean(axis=1)
    # Both are random: the ends of an interval of width .057 differ by less than a twentieth of it.
    assert [low, high] == pytest.approx(np.quantile(usual, [0.025, 0.975]), abs=0.003)
    assert made.sums[0] / made.num_rows == pytest.approx(values.mean())


def test_resamplings_are_a_function_of_seed_and_row():
    values = [0.0, 1.0, 1.0]
    assert (tally(values).resampled == tally(values).resampled).all()
    assert (tally(values, seed=1).resampled != tally(values).resampled).any()


def test_rows_of_each_resampling_are_counted():
    made = tally([1.0, 1.0, 0.0])
    np.testing.assert_array_equal(made.num_resampled, made.resampled[:, 1])


def test_what_is_mostly_no_number_has_no_interval():
    assert find_interval(np.array([np.nan, np.nan, 1.0])) is None
    assert find_interval(np.array([1.0, 1.0, np.nan])) == (1.0, 1.0)
