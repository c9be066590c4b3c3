"""Presets: the experiments by name, and what may lie above them."""

from __future__ import annotations

import pytest

from smolora.config import PRESETS, ExperimentConfig, resolve_config
from smolora.config.presets import read_preset
from smolora.errors import ConfigError

MODEL = "model.name_or_path=m"


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_has_the_settings_of_the_experiments(name):
    config = PRESETS[name]()
    assert (config.adapter.r, config.adapter.lora_alpha, config.adapter.lora_dropout) == (4, 32, 0.1)
    assert (config.training.max_steps, config.training.warmup_steps, config.training.rows_per_step) == (1000, 10, 16)
    columns = ("mr", "ref") if name.startswith("e2e") else ("dialogue", "summary")
    assert (config.data.prompt_field, config.data.completion_field) == columns


@pytest.mark.parametrize(
    ("word", "target"), [("attention", "attention_only"), ("mlp", "mlp_only"), ("dynamic", "both")]
)
@pytest.mark.parametrize("benchmark", ["e2e", "samsum"])
def test_a_preset_is_named_after_its_target(benchmark, word, target):
    config = PRESETS[f"{benchmark}_{word}"]()
    assert config.adapter.target_modules == target
    assert config.phases.is_on == (word == "dynamic")


def test_a_preset_names_no_model_for_a_run():
    with pytest.raises(ConfigError, match=r"model\.name_or_path is missing"):
        resolve_config(ExperimentConfig, preset=read_preset("e2e_mlp"))


def test_a_file_then_a_flag_then_a_word_lie_above_a_preset(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("adapter: {r: 2, lora_alpha: 2, lora_dropout: 0.2}\n")
    config = resolve_config(
        ExperimentConfig,
        preset=read_preset("e2e_mlp"),
        file=file,
        flags={"adapter.lora_alpha": 3, "adapter.lora_dropout": 0.3},
        assignments=[MODEL, "adapter.lora_dropout=0.4"],
    )
    adapter = config.adapter
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (2, 3, 0.4)
    assert (adapter.target_modules, config.training.max_steps) == ("mlp_only", 1000)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="no preset 'e2e_mpl'. Did you mean 'e2e_mlp'"):
        read_preset("e2e_mpl")
