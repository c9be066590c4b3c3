"""A configuration as a commented file: what is in force, what stands by with its default, and why."""

from __future__ import annotations

import re

import pytest
import yaml

from smolora.config import DataConfig, ExperimentConfig, ModelConfig, PretrainConfig, TrainingConfig
from smolora.config.annotated import annotate_config

CONFIG = ExperimentConfig(
    model=ModelConfig(name_or_path="m"),
    data=DataConfig(sources=("a b.csv", "ü.csv"), chat_template="{% for m in messages %}\n  {{ m }}\n{% endfor %}"),
    training=TrainingConfig(learning_rate=1e-5, profile_steps=(1, 2)),
    phases={"table": [{"groups": ["mlp"]}, {"layers": [0, 3]}]},
    evaluation={"require": "learned"},
)


def test_the_file_reads_back_as_the_configuration_with_what_it_sets_alone():
    found = yaml.safe_load(annotate_config(CONFIG, others=("training.seed", "adapter.r")))
    assert ExperimentConfig(**found) == CONFIG
    assert found == CONFIG.model_dump(mode="json", exclude_unset=True)


def test_settings_that_stand_by_are_at_their_defaults():
    others = [f"{section}.{name}" for section in ("adapter", "training", "speed") for name in _fields(section)]
    text = annotate_config(CONFIG, others=others)
    everything = yaml.safe_load(re.sub(r"(?m)^( *)#(?! )", r"\1", text))
    assert everything["training"].keys() == set(_fields("training"))
    assert ExperimentConfig(**everything) == CONFIG


def _fields(section):
    return list(type(CONFIG.__dict__[section]).model_fields)


def test_each_setting_stands_below_its_description_and_its_reason():
    text = annotate_config(CONFIG, head=["Why this file."], reasons={"training.learning_rate": "it was low."})
    assert text.startswith("# Why this file.\n\n# The base model.\nmodel:\n  # A folder in Hugging Face format,")
    assert "  # Peak learning rate of AdamW.\n  # Here: it was low.\n  learning_rate: 1.0e-05\n" in text


def test_a_section_that_sets_nothing_is_left_out_and_one_of_defaults_is_a_comment():
    text = annotate_config(ExperimentConfig(model=ModelConfig(name_or_path="m")), others=("training.seed",))
    assert "adapter" not in text
    assert "\n#training:\n  # Seed of initial weights, data order and dropout.\n  #seed: 0\n" in text


def test_lines_are_as_wide_as_a_reader_likes():
    assert max(map(len, annotate_config(CONFIG).splitlines())) <= 115


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_a_setting_outside_of_sections_is_written_too(device):
    assert annotate_config(PretrainConfig(device=device)) == f"# Where the run computes.\ndevice: {device}\n"
