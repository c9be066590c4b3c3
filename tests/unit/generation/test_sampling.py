"""Settings of an answer name what is allowed."""

from __future__ import annotations

import pytest

from smolora.errors import ConfigError
from smolora.generation.sampling import SamplingSettings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("max_new_tokens", 0),
        ("top_k", 0),
        ("top_p", 1.5),
        ("seed", -1),
        ("repetition_penalty", 0.0),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=rf"^{name}: .*found {value}"):
        SamplingSettings(**{name: value})


def test_a_misspelt_setting_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match="temprature: no such setting. Did you mean 'temperature'"):
        SamplingSettings(temprature=0.5)


def test_settings_are_frozen():
    with pytest.raises(ConfigError, match="frozen"):
        SamplingSettings().temperature = 0.0


def test_an_empty_stop_text_is_refused():
    with pytest.raises(ConfigError, match="stop"):
        SamplingSettings(stop=["end", ""])
