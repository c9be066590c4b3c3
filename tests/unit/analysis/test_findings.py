"""Spikes and stalls are found by their rules, and by nothing less; shares are those of the squares."""

from __future__ import annotations

import numpy as np
import pytest

from smolora.analysis.findings import (
    find_lowest,
    find_spikes,
    find_stalls,
    layer_totals,
    mean_shares,
    measure_shares,
)
from smolora.analysis.run_record import PhaseSpan

STEPS = np.arange(1, 101, dtype=np.float64)


def noisy(level, spread=0.02):
    return level * np.exp(spread * np.random.default_rng(0).normal(size=len(STEPS)))


def test_a_jump_is_one_spike_however_many_steps_it_lasts():
    values = noisy(1.0)
    values[[40, 41, 80]] *= 3
    spikes = find_spikes(STEPS, values, [])
    assert [(spike.first, spike.last) for spike in spikes] == [(41, 42), (81, 81)]
    assert spikes[0].ratio == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize(
    "values",
    [
        noisy(1.0),
        noisy(1.0, spread=0.5),  # A value of 3 times the median is nothing unusual here.
        10 * np.exp(-STEPS / 5),
        np.exp(STEPS / 100),
        np.ones(100),
        np.where(STEPS == 50, 1.4, 1.0),  # Far from a curve without noise, but less than one and a half times it.
    ],
)
def test_noise_falling_rising_and_small_steps_are_no_spikes(values):
    assert find_spikes(STEPS, values, []) == []


def test_each_phase_is_judged_by_its_own_level():
    values = np.where(STEPS <= 50, noisy(1.0), noisy(8.0))
    assert find_spikes(STEPS, values, [])
    phases = [PhaseSpan("1", 1, 50, 1, 50.5), PhaseSpan("2", 51, 100, 50.5, 100)]
    assert find_spikes(STEPS, values, phases) == []


def test_values_that_are_not_finite_are_passed_over():
    values = noisy(1.0)
    values[40] = np.nan
    assert find_spikes(STEPS, values, []) == []


def test_a_flat_stretch_is_a_stall_and_so_is_a_rise():
    falling = np.linspace(4, 3, 40)
    flat = np.full(30, 3.0)
    again = np.linspace(3, 2, 30)
    [stall] = find_stalls(STEPS, np.concatenate([falling, flat, again]))
    assert 38 <= stall.first <= 46
    assert 70 <= stall.last <= 80
    [stall] = find_stalls(STEPS, np.concatenate([falling, np.linspace(3, 3.5, 60)]))
    assert stall.last == 100


def test_a_loss_that_keeps_falling_has_no_stall():
    assert find_stalls(STEPS, noisy(1.0) * np.linspace(4, 1, 100)) == []


def test_a_short_flat_stretch_is_no_stall():
    losses = np.concatenate([np.linspace(4, 3, 45), np.full(8, 3.0), np.linspace(2.9, 2, 47)])
    assert find_stalls(STEPS, losses) == []


def test_shares_are_of_the_squares_and_a_frozen_row_has_none():
    shares = measure_shares(np.array([[3.0, 3.0, np.nan], [4.0, np.nan, np.nan]]))
    np.testing.assert_allclose(shares, [[0.36, 1, np.nan], [0.64, 0, np.nan]])


def test_every_step_counts_alike_in_a_mean_share():
    shares = measure_shares(np.array([[1000.0, 1.0, np.nan], [0.0, 1.0, np.nan]]))
    np.testing.assert_allclose(mean_shares(shares), [0.75, 0.25])
    assert mean_shares(shares[:, 2:]).tolist() == [0, 0]


def test_a_layers_norm_is_over_its_groups():
    totals = layer_totals({"attention": np.array([[3.0, np.nan, np.nan]]), "mlp": np.array([[4.0, 4.0, np.nan]])})
    np.testing.assert_allclose(totals, [[5, 4, np.nan]])


def test_the_lowest_value_is_found_among_gaps():
    assert find_lowest(STEPS[:3], np.array([np.nan, 2.0, 3.0])) == (2, 2.0)
    assert find_lowest(STEPS[:1], np.array([np.nan])) is None
