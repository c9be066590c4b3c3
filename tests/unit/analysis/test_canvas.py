"""What every plot shares: the numbers beside a logarithmic scale."""

from __future__ import annotations

import pytest

from smolora.analysis.canvas import locate_decades


@pytest.mark.parametrize("low", [0.0021, 0.11, 1.0, 1.6, 2.1, 5.5, 73.0])
@pytest.mark.parametrize("ratio", [1.5, 2.1, 4.0, 9.9, 10.1, 31.0, 99.0, 301.0, 1e6])
def test_every_scale_has_two_numbers_at_least_and_no_crowd(low, ratio):
    high = low * ratio
    inside = [tick for tick in locate_decades(low, high).tick_values(low, high) if low <= tick <= high]
    assert 2 <= len(inside) <= 7, inside
