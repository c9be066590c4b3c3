"""Other tools' names of settings are read, with a line that names ours; what would have to be guessed is refused."""

from __future__ import annotations

import logging

import pytest

from smolora.config import ExperimentConfig, PrepareConfig, PretrainConfig, flatten_settings, resolve_config
from smolora.config.aliases import _OTHER, _SAME, rename_aliases
from smolora.errors import ConfigError


def _renamed(settings, kind=ExperimentConfig):
    return flatten_settings(rename_aliases(kind, settings))


@pytest.mark.parametrize(
    ("name", "value", "path", "ours"),
    [
        ("lora_r", 4, "adapter.r", 4),
        ("lora_alpha", 8, "adapter.lora_alpha", 8),
        ("lora_dropout", 0.1, "adapter.lora_dropout", 0.1),
        ("lora_target_modules", ["q_proj"], "adapter.target_modules", ["q_proj"]),
        ("lora_target", "all", "adapter.target_modules", "all"),
        ("target_modules", "all-linear", "adapter.target_modules", "all"),
        ("cutoff_len", 512, "data.max_length", 512),
        ("sequence_len", 512, "data.max_length", 512),
        ("max_seq_length", 512, "data.max_length", 512),
        ("max_length", 512, "data.max_length", 512),
        ("micro_batch_size", 2, "training.per_device_train_batch_size", 2),
        ("batch_size", 2, "training.per_device_train_batch_size", 2),
        ("gradient_accumulation_steps", 4, "training.gradient_accumulation_steps", 4),
        ("num_epochs", 3, "training.num_train_epochs", 3),
        ("num_train_epochs", 3, "training.num_train_epochs", 3),
        ("epochs", 3, "training.num_train_epochs", 3),
        ("learning_rate", 1e-3, "training.learning_rate", 1e-3),
        ("lr", 1e-3, "training.learning_rate", 1e-3),
        ("warmup_ratio", 0.03, "training.warmup_steps", 0.03),
        ("lr_scheduler", "cosine", "training.lr_scheduler_type", "cosine"),
        ("lr_scheduler_type", "constant_with_warmup", "training.lr_scheduler_type", "constant"),
        ("max_steps", -1, "training.max_steps", None),
        ("eval_steps", 50, "training.eval_steps", 50),
        ("save_steps", 50, "training.save_steps", 50),
        ("seed", 7, "training.seed", 7),
        ("gradient_checkpointing", True, "training.gradient_checkpointing", True),
        ("val_set_size", 0.1, "data.validation_fraction", 0.1),
        ("base_model", "m", "model.name_or_path", "m"),
        ("model_name_or_path", "m", "model.name_or_path", "m"),
        ("model", "m", "model.name_or_path", "m"),
        ("load_in_4bit", True, "model.quantization", "4bit"),
        ("load_in_8bit", True, "model.quantization", "8bit"),
        ("quantization_bit", 8, "model.quantization", "8bit"),
        ("bf16", True, "model.dtype", "bfloat16"),
        ("fp16", True, "model.dtype", "float16"),
        ("torch_dtype", "torch.bfloat16", "model.dtype", "bfloat16"),
        ("finetuning_type", "lora", "adapter.method", "lora"),
        ("adapter", "lora", "adapter.method", "lora"),
        ("datasets", ["a.jsonl"], "data.sources", ["a.jsonl"]),
        ("per_device_eval_batch_size", 4, "evaluation.batch_size", 4),
        ("early_stopping_patience", 4, "evaluation.early_stopping_patience", 4),
    ],
)
def test_a_name_outside_of_the_sections_is_read(name, value, path, ours):
    assert _renamed({name: value}) == {path: ours}


@pytest.mark.parametrize(
    ("section", "name", "path"),
    [
        ("training", "epochs", "training.num_train_epochs"),
        ("training", "max_length", "data.max_length"),
        ("adapter", "lora_r", "adapter.r"),
        ("lora", "r", "adapter.r"),
        ("adapter", "alpha", "adapter.lora_alpha"),
        ("data", "cutoff_len", "data.max_length"),
        ("evaluation", "eval_steps", "training.eval_steps"),
        ("model", "base_model", "model.name_or_path"),
    ],
)
def test_a_name_is_read_inside_of_a_section_too_whichever_it_is(section, name, path):
    assert _renamed({section: {name: 1}}) == {path: 1}


@pytest.mark.parametrize("name", ["load_in_4bit", "bf16", "use_dora"])
def test_a_switch_that_is_off_sets_nothing(name):
    assert _renamed({name: False}) == {}


def test_a_switch_takes_no_other_value():
    with pytest.raises(ConfigError, match="is a switch, true or false; found 'yes'"):
        _renamed({"load_in_4bit": "yes"})


def test_qlora_is_lora_on_four_bits():
    assert _renamed({"adapter": "qlora", "load_in_4bit": True}) == {
        "adapter.method": "lora",
        "model.quantization": "4bit",
    }


def test_a_variant_of_lora_may_be_switched_on_beside_lora():
    assert _renamed({"finetuning_type": "lora", "use_dora": True}) == {"adapter.method": "dora"}


def test_the_rows_of_other_kinds_of_runs_have_their_own_names():
    assert _renamed({"n_layer": 2, "block_size": 32, "dropout": 0.1, "max_iters": 5}, PretrainConfig) == {
        "gpt.num_layers": 2,
        "gpt.context": 32,
        "gpt.dropout": 0.1,
        "training.max_steps": 5,
    }
    assert _renamed({"max_seq_length": 32}, PretrainConfig) == {"gpt.context": 32}
    assert _renamed({"seed": 3, "val_size": 0.2}, PrepareConfig) == {"seed": 3, "data.validation_fraction": 0.2}


@pytest.mark.parametrize("path", sorted({*_SAME, *(alias.path for alias in _OTHER.values())}))
def test_every_alias_leads_to_a_setting(path):
    kinds = (ExperimentConfig(model={"name_or_path": "m"}), PretrainConfig())
    assert any(path in flatten_settings(config.model_dump()) for config in kinds)


def test_one_line_says_what_was_read_as_what(caplog):
    with caplog.at_level(logging.INFO, logger="smolora"):
        resolve_config(ExperimentConfig, assignments=["base_model=m", "lora_r=4", "training.seed=1"])
    assert caplog.messages == ["other names were read: base_model is model.name_or_path, lora_r is adapter.r"]


def test_our_own_names_say_nothing(caplog):
    with caplog.at_level(logging.INFO, logger="smolora"):
        resolve_config(ExperimentConfig, assignments=["model.name_or_path=m", "training.seed=1"])
    assert caplog.messages == []


def test_the_folder_of_the_run_is_left_out_and_explained(caplog):
    with caplog.at_level(logging.INFO, logger="smolora"):
        assert _renamed({"output_dir": "out"}) == {}
    assert "output_dir is left out, since the folder of a run is named with -o" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"lora_r": 4, "adapter": {"r": 8}},
            "lora_r and adapter.r both set adapter.r: give one of them",
        ),
        ({"adapter": {"r": 4}, "lora_r": 4}, "adapter.r and lora_r both set adapter.r"),
        ({"epochs": 1, "num_epochs": 2}, "epochs and num_epochs both set training.num_train_epochs"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "both set model.quantization"),
        ({"training": 5, "lr": 1e-3}, "training: expected settings, found 5"),
    ],
)
def test_two_names_of_one_setting_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        _renamed(settings)


def test_a_flag_and_another_name_on_the_command_line_are_refused():
    with pytest.raises(ConfigError, match="training.learning_rate and lr both set"):
        resolve_config(ExperimentConfig, flags={"training.learning_rate": 1e-3}, assignments=["lr=1e-4"])


def test_another_name_in_a_later_layer_wins(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("base_model: m\nlr: 1e-3\n")
    assert resolve_config(ExperimentConfig, file=file, assignments=["lr=1e-4"]).training.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 8, "gradient_accumulation_steps": 2}, "some mean the rows of a pass by it, others those of an"),
        ({"warmup_ratio": 5}, "a share of the whole, below 1, is meant by this name; found 5"),
        ({"val_set_size": 200}, "200 held-out rows can't be asked for"),
    ],
)
def test_what_would_have_to_be_guessed_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        _renamed(settings)


def test_what_is_no_name_of_anything_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"lora_rr: no such setting"):
        resolve_config(ExperimentConfig, assignments=["model=m", "lora_rr=4"])
    with pytest.raises(ConfigError, match=r"adapter.lora_alhpa: no such .*Did you mean 'lora_alpha'"):
        resolve_config(ExperimentConfig, assignments=["model=m", "adapter.lora_alhpa=4"])
