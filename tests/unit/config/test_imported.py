"""Files of other tools as configurations of ours; what has no counterpart is listed with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from smolora.config import flatten_settings
from smolora.config.imported import import_config
from smolora.errors import ConfigError

LLAMA_FACTORY = """
model_name_or_path: org/Small-1B
trust_remote_code: true
quantization_bit: 4
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_target: q_proj,v_proj
use_dora: true
dataset: identity,demo.json
template: llama3
cutoff_len: 1024
max_samples: 1000
output_dir: saves/x
logging_steps: 10
save_steps: 500
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
val_size: 0.1
loraplus_lr_ratio: 16.0
"""

AXOLOTL = """
base_model: org/Small-1B
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: org/instructions
    type: alpaca
  - path: json
    data_files: [notes.jsonl]
    type: completion
    field: body
    split: "train[:10%]"
val_set_size: 0.05
output_dir: ./outputs/q
adapter: qlora
lora_model_dir:
sequence_len: 2048
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_target_linear: true
wandb_project: me
gradient_accumulation_steps: 4
micro_batch_size: 2
optimizer: adamw_bnb_8bit
lr_scheduler: linear
learning_rate: 0.0002
bf16: auto
gradient_checkpointing: true
evals_per_epoch: 4
loss_watchdog_threshold: 5.0
"""


def _import(text, folder=Path("nowhere")):
    return import_config(yaml.safe_load(text), folder)


def test_a_file_of_llama_factory_keeps_its_meaning():
    assert flatten_settings(_import(LLAMA_FACTORY).settings) == {
        "model.name_or_path": "org/Small-1B",
        "model.quantization": "4bit",
        "model.dtype": "bfloat16",
        "data.sources": ["identity", "demo.json"],
        "data.max_length": 1024,
        "data.overlong": "truncate",
        "data.validation_fraction": 0.1,
        "adapter.method": "dora",
        "adapter.r": 16,
        "adapter.lora_alpha": 32,
        "adapter.lora_dropout": 0.0,
        "adapter.target_modules": "q_proj,v_proj",
        "training.learning_rate": 1e-4,
        "training.num_train_epochs": 3.0,
        "training.per_device_train_batch_size": 1,
        "training.gradient_accumulation_steps": 8,
        "training.warmup_steps": 0.1,
        "training.lr_scheduler_type": "cosine",
        "training.logging_steps": 10,
        "training.save_steps": 500,
        "training.report_to": "none",
    }


def test_a_file_of_axolotl_keeps_its_meaning():
    assert flatten_settings(_import(AXOLOTL).settings) == {
        "model.name_or_path": "org/Small-1B",
        "model.quantization": "4bit",
        "data.sources": ["org/instructions", "notes.jsonl"],
        "data.text_field": "body",
        "data.max_length": 2048,
        "data.overlong": "drop",
        "data.validation_fraction": 0.05,
        "adapter.method": "lora",
        "adapter.r": 32,
        "adapter.lora_alpha": 16,
        "adapter.lora_dropout": 0.0,
        "adapter.target_modules": "all",
        "training.learning_rate": 2e-4,
        "training.per_device_train_batch_size": 2,
        "training.gradient_accumulation_steps": 4,
        "training.warmup_steps": 0.03,
        "training.lr_scheduler_type": "linear",
        "training.gradient_checkpointing": True,
    }


@pytest.mark.parametrize("text", [LLAMA_FACTORY, AXOLOTL])
def test_every_key_is_in_it_or_listed(text):
    made, values = _import(text), yaml.safe_load(text)
    without_counterpart = {"loraplus_lr_ratio", "loss_watchdog_threshold"} & values.keys()
    assert {key for key, reason in made.left_out.items() if reason == "no counterpart"} >= without_counterpart
    for key, value in values.items():
        if value is None or key in made.left_out:
            continue
        less = import_config({name: other for name, other in values.items() if name != key} | _needed(key), Path())
        assert less.settings != made.settings or key in ("finetuning_type", "load_in_4bit"), key


def _needed(key):
    return {key: "other"} if key in ("model_name_or_path", "base_model") else {}


@pytest.mark.parametrize("text", [LLAMA_FACTORY, AXOLOTL])
def test_what_was_made_is_a_configuration(text):
    made = _import(text)
    assert made.build().model.name_or_path == "org/Small-1B"
    assert all(made.left_out.values())


def test_an_empty_adapter_trains_the_whole_model_and_what_is_lora_s_is_listed():
    made = _import("base_model: m\nadapter:\nsequence_len: 64\nlora_r: 8\n")
    assert made.settings["adapter"] == {"method": "full"}
    assert "no such setting of full" in made.left_out["lora_r"]


def _import_of(folder, entries):
    (folder / "data").mkdir()
    (folder / "data" / "dataset_info.json").write_text(json.dumps(entries))
    return _import(f"model_name_or_path: m\nstage: sft\ndataset: {','.join([*entries, 'gone'])}\n", folder)


def test_names_of_datasets_are_looked_up_where_their_list_is(tmp_path):
    made = _import_of(tmp_path, {"mine": {"file_name": "mine.json"}, "far": {"hf_hub_url": "org/far", "split": "a"}})
    assert made.settings["data"]["sources"] == ["data/mine.json", "org/far", "gone"]
    assert made.left_out["dataset far: split"] == "no counterpart"
    assert "dataset gone" in made.left_out


PAIR = {"prompt": "q", "response": "a"}


@pytest.mark.parametrize(
    ("columns", "fields", "is_said"),
    [
        ([PAIR, PAIR], {"prompt_field": "q", "completion_field": "a"}, False),
        ([{"prompt": "instruction", "query": "input", "response": "output"}], {}, False),
        ([{**PAIR, "query": "more"}], {}, True),
        ([PAIR, {"prompt": "x", "response": "y"}], {"prompt_field": "q", "completion_field": "a"}, True),
    ],
)
def test_columns_of_datasets_are_taken_where_they_are_a_pair_s(tmp_path, columns, fields, is_said):
    entries = {f"d{number}": {"file_name": "d.json", "columns": given} for number, given in enumerate(columns)}
    made = _import_of(tmp_path, entries)
    found = {name: value for name, value in made.settings["data"].items() if name.endswith("_field")}
    assert (found, any("columns" in key for key in made.left_out)) == (fields, is_said)


def test_a_dataset_of_preferences_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="dataset pairs: ranking: true has no counterpart: train learns answers"):
        _import_of(tmp_path, {"pairs": {"file_name": "p.json", "ranking": True}})


@pytest.mark.parametrize(
    ("line", "key", "reason"),
    [
        ("lr_scheduler_type: polynomial", "lr_scheduler_type", "input should be 'linear', 'cosine'"),
        ("val_size: 200", "val_size", "200 held-out rows can't be asked for"),
        ("warmup_ratio: 0.1\nwarmup_steps: 5", "warmup_steps", "another key sets training.warmup_steps to 0.1"),
        ("trust_remote_code: true", "trust_remote_code", "code that comes with a model is never run"),
        ("flash_attn: auto", "flash_attn", "attention is chosen by itself"),
    ],
)
def test_what_cant_be_taken_is_listed_with_the_reason(line, key, reason):
    assert reason in _import(f"model_name_or_path: m\ntemplate: x\n{line}\n").left_out[key]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        *(
            (f"stage: {stage}", "train learns answers .sft. and whole texts .pt.")
            for stage in ("dpo", "kto", "rm", "ppo")
        ),
        ("finetuning_type: freeze", "finetuning_type: freeze has no counterpart: .*Methods: lora, "),
        ("train_on_prompt: true", "train learns the answer alone"),
        ("mask_history: true", "train learns every answer"),
    ],
)
def test_a_file_of_llama_factory_that_learns_otherwise_is_refused(line, reason):
    with pytest.raises(ConfigError, match=rf"{reason}.*Without this key, the rest can be imported\.$"):
        _import(f"model_name_or_path: m\ntemplate: x\n{line}\n")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("rl: dpo", "rl: dpo has no counterpart: train learns answers"),
        ("reward_model: true", "from no preferences and no rewards"),
        ("train_on_inputs: true", "train learns the answer alone"),
        ("unfrozen_parameters: [lm_head]", "train moves an adapter"),
        ("adapter: llama-adapter", "adapter: llama-adapter has no counterpart: "),
    ],
)
def test_a_file_of_axolotl_that_learns_otherwise_is_refused(line, reason):
    with pytest.raises(ConfigError, match=reason):
        _import(f"base_model: m\nsequence_len: 64\n{line}\n")


@pytest.mark.parametrize("line", ["rl: false", "train_on_inputs: false", "rl:", "adapter: lora"])
def test_a_key_that_leaves_what_is_learned_alone_is_no_reason_to_refuse(line):
    assert _import(f"base_model: m\nsequence_len: 64\n{line}\n").settings["model"] == {"name_or_path": "m"}


def test_whole_texts_of_llama_factory_are_not_taken_for_rows_with_a_prompt():
    assert _import("model_name_or_path: m\nstage: pt\n").settings["data"]["text_field"] == "text"


@pytest.mark.parametrize("text", ["model: {name_or_path: m}", "lr: 1"])
def test_a_file_of_nobody_known_is_refused(text):
    with pytest.raises(ConfigError, match="neither a file of LLaMA-Factory"):
        _import(text)
