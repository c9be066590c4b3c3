"""A plateau: so many measurements in a row without improvement."""

from __future__ import annotations

import pytest

from smolora.config import PlateauConfig
from smolora.training.plateau import PlateauDetector


def reached_at(values, **settings):
    detector = PlateauDetector()
    return [index for index, value in enumerate(values) if detector.is_reached(value, PlateauConfig(**settings))]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0, 2.0, 1.0], []),
        ([3.0, 3.0, 3.0], [2]),
        ([3.0, 3.5, 2.9, 3.0, 3.0], [4]),
        ([3.0, float("nan"), float("nan")], [2]),
        ([float("nan"), float("nan"), 1.0], [1]),
    ],
)
def test_it_is_reached_after_patience_measurements_that_improve_nothing(values, expected):
    assert reached_at(values, patience=2) == expected


def test_an_improvement_below_the_threshold_is_none():
    assert reached_at([3.0, 2.95, 2.9], patience=1, threshold=0.2) == [1, 2]


def test_it_goes_on_from_its_state():
    whole, first = PlateauDetector(), PlateauDetector()
    for value in (2.0, 2.5):
        assert not whole.is_reached(value, PlateauConfig(patience=2))
        assert not first.is_reached(value, PlateauConfig(patience=2))
    second = PlateauDetector.from_state(first.to_state())
    assert second.is_reached(2.5, PlateauConfig(patience=2)) == whole.is_reached(2.5, PlateauConfig(patience=2)) is True
