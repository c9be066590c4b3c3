"""Sections are frozen and strict, and their errors name field, value and what is allowed."""

from __future__ import annotations

import pytest

from smolora.config import (
    DataConfig,
    DynamicLoRAConfig,
    EvaluationConfig,
    ExperimentConfig,
    GPTConfig,
    LoRAConfig,
    ModelConfig,
    TokenizerConfig,
    TrainingConfig,
)
from smolora.errors import ConfigError


def test_a_misspelt_key_names_the_nearest_one():
    with pytest.raises(ConfigError, match="learning_rat: no such setting. Did you mean 'learning_rate'"):
        TrainingConfig(learning_rat=1)


def test_a_nested_misspelt_key_is_given_with_its_whole_path():
    with pytest.raises(ConfigError, match=r"^training\.learning_rat: no such setting"):
        ExperimentConfig(model={"name_or_path": "x"}, training={"learning_rat": 1})


def test_a_bad_value_is_a_value_error_that_shows_what_was_found():
    with pytest.raises(ValueError, match=r"learning_rate: .*greater than or equal to 0 \(found -1\)"):
        TrainingConfig(learning_rate=-1)


def test_a_list_is_asked_for_in_the_words_of_yaml():
    with pytest.raises(ConfigError, match=r"clean: input should be a list, as \[a, b\] \(found True\)"):
        DataConfig(clean=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_learning_rate_that_is_not_finite_is_refused(value):
    with pytest.raises(ConfigError, match="learning_rate"):
        TrainingConfig(learning_rate=value)


def test_max_steps_of_zero_is_refused():
    with pytest.raises(ConfigError, match="max_steps"):
        TrainingConfig(max_steps=0)


def test_assignment_is_refused_with_a_word_on_model_copy():
    with pytest.raises(ConfigError, match="model_copy"):
        TrainingConfig().seed = 3


def test_replace_validates_the_new_value():
    assert TrainingConfig(seed=1).replace(learning_rate=0.5).learning_rate == 0.5
    with pytest.raises(ConfigError):
        TrainingConfig().replace(learning_rate=-1)


def test_replace_keeps_what_was_set_before():
    assert TrainingConfig(seed=7).replace(learning_rate=0.5).seed == 7


@pytest.mark.parametrize(
    ("section", "idle", "without", "beside"),
    [
        (EvaluationConfig, {"early_stopping_threshold": 1}, "early_stopping_patience", {"early_stopping_patience": 2}),
        (EvaluationConfig, {"plateau_factor": 0.1}, "plateau_patience", {"plateau_patience": 2}),
        (DataConfig, {"chunk_tokenizer": "m"}, "chunk_size", {"chunk_size": 9}),
        (TokenizerConfig, {"vocab_size": 300}, "kind=bpe", {"kind": "bpe"}),
        (DynamicLoRAConfig, {"moments": "reset"}, "a strategy or a table", {"strategy": "early,late"}),
        (DynamicLoRAConfig, {"warmup_steps": 5}, "a strategy or a table", {"enabled": False}),
        (DynamicLoRAConfig, {"learning_rate": "restart"}, "a strategy or a table", {"table": [{"groups": "mlp"}]}),
    ],
)
def test_a_setting_that_nothing_reads_without_another_is_refused_unless_at_its_default(section, idle, without, beside):
    [name] = idle
    with pytest.raises(ConfigError, match=rf"{name}=\S+ would change nothing without {without}.*: set that too"):
        section(**idle)
    assert section(**idle, **beside).model_fields_set == {name, *beside}
    assert section(**{name: section.model_fields[name].default}) == section()


def test_the_name_of_a_file_is_no_chat_template():
    with pytest.raises(ConfigError, match="chat_template: .* give its text, not the name of its file"):
        DataConfig(chat_template="tpl.jinja")


def test_rows_per_step_multiplies_accumulation():
    config = TrainingConfig(per_device_train_batch_size=4, gradient_accumulation_steps=3)
    assert config.rows_per_step == 12
    assert config.with_rows_per_step(6).per_device_train_batch_size == 2


def test_rows_that_accumulation_does_not_divide_are_refused():
    with pytest.raises(ConfigError, match=r"--batch-size: 7 rows a step .*Give 6 or 8\."):
        TrainingConfig(gradient_accumulation_steps=2).with_rows_per_step(7)
    with pytest.raises(ConfigError, match=r"Give 2\."):
        TrainingConfig(gradient_accumulation_steps=2).with_rows_per_step(-1)


def test_processes_share_the_rows_of_a_step():
    config = TrainingConfig(gradient_accumulation_steps=2)
    assert config.with_rows_per_step(12, 2).per_device_train_batch_size == 3
    with pytest.raises(ConfigError, match="6 rows a step .* passes on 2 processes"):
        config.with_rows_per_step(6, 2)


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match="num_heads must divide width"):
        GPTConfig(width=10, num_heads=4)


def test_target_modules_take_a_comma_list_or_a_named_set():
    assert LoRAConfig(target_modules="q_proj, v_proj").target_modules == ("q_proj", "v_proj")
    assert LoRAConfig(target_modules="attention_only").target_modules == "attention_only"
    with pytest.raises(ConfigError, match="at least one module"):
        LoRAConfig(target_modules=[])


def test_a_single_source_may_be_given_without_a_list():
    assert DataConfig(sources="rows.jsonl").sources == ("rows.jsonl",)


def test_lora_is_another_name_of_the_section_adapter():
    config = ExperimentConfig(model=ModelConfig(name_or_path="x"), adapter=LoRAConfig(r=2))
    assert config.lora is config.adapter


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ("none", ()),
        (None, ()),
        ([], ()),
        ("wandb", ("wandb",)),
        ("tensorboard, wandb", ("tensorboard", "wandb")),
        (["mlflow", "trackio", "mlflow"], ("mlflow", "trackio")),
    ],
)
def test_trackers_are_a_name_a_list_or_none(written, names):
    assert TrainingConfig(report_to=written).report_to == names


@pytest.mark.parametrize("written", ["wandbb", ["none", "wandb"], ["wandbb"]])
def test_an_unknown_tracker_is_refused_with_those_that_are_known(written):
    with pytest.raises(ConfigError, match="training.report_to|report_to: no tracker .* Trackers: tensorboard, trackio"):
        TrainingConfig(report_to=written)


def test_a_tracker_must_be_a_name():
    with pytest.raises(ConfigError, match="report_to"):
        TrainingConfig(report_to=3)
