"""Intervals are Student's, and a verdict needs the whole interval on one side."""

from __future__ import annotations

import math
import random

import pytest

from smolora.analysis.paired import compare_pairs


def test_the_interval_is_that_of_the_paired_t():
    found = compare_pairs([2.1, 2.3, 2.0], [2.0, 2.0, 2.0], confidence=0.95)
    reach = 4.30265 * math.sqrt((0.1**2 + 0.3**2 - 3 * (0.4 / 3) ** 2) / 2 / 3)
    assert (found.mean, found.low, found.high) == pytest.approx((0.4 / 3, 0.4 / 3 - reach, 0.4 / 3 + reach))
    assert found.verdict == "no difference"


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [((1.0, 1.1, 1.05), "better"), ((3.0, 3.1, 3.05), "worse"), ((2.0, 2.0, 2.0), "no difference")],
)
def test_the_verdict_follows_the_interval(losses, verdict):
    assert compare_pairs(losses, (2.0, 2.0, 2.0), confidence=0.95).verdict == verdict


def test_noise_alone_is_called_a_difference_as_rarely_as_promised():
    draw = random.Random(0)
    pairs = [[(draw.gauss(0, 1), draw.gauss(0, 1)) for _ in range(4)] for _ in range(2000)]
    called = sum(compare_pairs(*zip(*pair, strict=True), confidence=0.95).verdict != "no difference" for pair in pairs)
    # 5 % of 2,000, give or take 4 standard deviations of a binomial count.
    assert abs(called - 100) < 4 * math.sqrt(2000 * 0.05 * 0.95)
