"""LLaMA-Factory's and axolotl's files as configurations of ours, with a reason for every key that has no counterpart.

Where such a file is silent and the tool's default is another one than ours, the tool's is written out, so that these
settings stay what they were. What isn't taken is listed: no key is dropped without a word. A file whose objective or
method train doesn't have is refused, as something else would be learned.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from smolora.config.aliases import OUTPUT_NAMES, Settings, find_alias
from smolora.config.experiment import ExperimentConfig
from smolora.errors import ConfigError

Tool = Literal["LLaMA-Factory", "axolotl"]
Values = Mapping[str, Any]

_MARKS: dict[Tool, tuple[str, set[str]]] = {
    "LLaMA-Factory": ("model_name_or_path", {"stage", "finetuning_type", "cutoff_len", "template", "dataset"}),
    "axolotl": ("base_model", {"datasets", "adapter", "sequence_len", "micro_batch_size"}),
}
"""The model's key, and keys of which a file of the tool has one."""

_DEFAULTS: dict[Tool, Settings] = {
    "LLaMA-Factory": {
        "data.max_length": 2048,
        "data.overlong": "truncate",
        "training.learning_rate": 5e-5,
        "training.num_train_epochs": 3.0,
        "training.warmup_steps": 0,
        "adapter.lora_dropout": 0.0,
    },
    "axolotl": {
        "data.max_length": 512,
        "data.overlong": "drop",
        "training.per_device_train_batch_size": 1,
        "training.lr_scheduler_type": "cosine",
        "training.warmup_steps": 0.03,
        "adapter.lora_dropout": 0.0,
    },
}
"""Defaults of the tools that aren't ours."""

_BY_ITSELF = {
    "stage": "train learns the answers of rows that have a prompt",
    "do_train": "train is the verb",
    "overwrite_output_dir": "a run is never written over; name another folder with -o",
    "resume_from_checkpoint": "smolora train --resume -o RUN",
    "plot_loss": "every run draws its plots",
    "overwrite_cache": "nothing is cached",
    "dataset_prepared_path": "nothing is cached; smolora prepare writes cleaned rows",
    "preprocessing_num_workers": "rows are encoded in one process",
    "dataloader_num_workers": "rows are encoded before the first step",
    "sample_packing": "rows always lie end to end without padding; speed.max_tokens_per_batch fills passes",
    "eval_sample_packing": "rows always lie end to end without padding",
    "pad_to_sequence_len": "rows lie end to end without padding",
    "packing": "rows always lie end to end without padding; speed.max_tokens_per_batch fills passes",
    "flash_attention": "attention is chosen by itself",
    "flash_attn": "attention is chosen by itself",
    "attn_implementation": "attention is chosen by itself",
    "sdp_attention": "attention is chosen by itself",
    "template": "rows are rendered by the tokenizer's chat template, or by data.chat_template, a Jinja text",
    "chat_template": "rows are rendered by the tokenizer's chat template; data.chat_template takes a Jinja text",
    "trust_remote_code": "code that comes with a model is never run",
    "model_type": "the model's config.json says it",
    "tokenizer_type": "the tokenizer's files say it",
    "quantization_method": "bitsandbytes, where quantization is asked for",
    "max_samples": "all rows are read; cut the file",
    "evals_per_epoch": "training.eval_steps counts updates; left out, five evaluations a run",
    "saves_per_epoch": "training.save_steps counts updates",
    "eval_strategy": "there are evaluations where rows are held out, every training.eval_steps updates",
    "evaluation_strategy": "there are evaluations where rows are held out, every training.eval_steps updates",
    "save_strategy": "checkpoints are written every training.save_steps updates",
    "save_only_model": "a checkpoint always holds what resuming needs",
    "ddp_timeout": "asked of torchrun",
    "deepspeed": "asked of accelerate's own configuration",
    "fsdp": "asked of accelerate's own configuration",
    "fsdp_config": "asked of accelerate's own configuration",
    "dataset_dir": "paths in data.sources are relative to where train is started",
    "special_tokens": "the tokenizer's own are taken",
    "lora_modules_to_save": "only the adapter is trained, and a classifier's head",
    "additional_target": "only the adapter is trained, and a classifier's head",
}
"""What needs no setting here, or can't be one, and why."""

_NO_COUNTERPART = "no counterpart"

_ANSWERS_AND_TEXTS = "train learns answers (sft) and whole texts (pt), from no preferences and no rewards"
_ANSWERS_ALONE = "where rows have a prompt, train learns the answer alone; rows of one text it learns whole"

_LEARNED_OTHERWISE: dict[str, tuple[tuple[object, ...], str]] = {
    "stage": (("sft", "pt"), _ANSWERS_AND_TEXTS),
    "rl": ((False,), _ANSWERS_AND_TEXTS),
    "reward_model": ((False,), _ANSWERS_AND_TEXTS),
    "process_reward_model": ((False,), _ANSWERS_AND_TEXTS),
    "train_on_inputs": ((False,), _ANSWERS_ALONE),
    "train_on_prompt": ((False,), _ANSWERS_ALONE),
    "mask_history": ((False,), "train learns every answer of a conversation"),
    "unfrozen_parameters": (([],), "train moves an adapter, or with adapter.method=full all weights"),
}
"""Keys that change what is learned: the values that fit, and what train can do instead."""

_FORMS = (
    "rows are text, prompt and completion, instruction and output, or messages with role and content, or conversations"
)

_FIELDS = {"prompt": "prompt_field", "response": "completion_field"}
_USUAL_COLUMNS = {
    ("prompt", "instruction"),
    ("query", "input"),
    ("response", "output"),
    ("messages", "messages"),
    ("messages", "conversations"),
}
"""Roles of LLaMA-Factory's columns: our fields, and the names that are recognised."""

_READ_OF_ENTRIES = {"file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "formatting", "ranking", "columns"}

_ROW_TYPES = {"alpaca", "completion", "chat_template", "sharegpt", "input_output"}
"""Types of axolotl's datasets whose columns are recognised, or named by other keys of the entry."""


@dataclass
class Imported:
    """What a file of another tool says in our words."""

    tool: Tool
    settings: dict[str, Any] = field(default_factory=dict)
    """Nested."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Keys without a counterpart, and why."""
    filled: dict[str, Any] = field(default_factory=dict)
    """The tool's defaults that were written out, by path."""

    def build(self) -> ExperimentConfig:
        """Return the configuration."""
        return ExperimentConfig(**self.settings)

    def add(self, key: str, given: Settings) -> None:
        """Take what a key sets, unless another key has set it or the configuration refuses it; that is the reason."""
        for path, value in given.items():
            section, _, name = path.partition(".")
            before = self.settings.get(section, {}).get(name, value)
            if before != value and path != "adapter.method":  # A variant of LoRA is asked for beside it.
                self.left_out[key] = f"another key sets {path} to {before}"
                return
        try:
            self.take(given)
        except ConfigError as error:
            self.left_out[key] = str(error)

    def takes(self, given: Settings) -> bool:
        """Take settings where the configuration has them; return whether it has."""
        try:
            self.take(given)
        except ConfigError:
            return False
        return True

    def take(self, given: Settings) -> None:
        """Take settings by path.

        Raises:
            ConfigError: The configuration refuses them.
        """
        changed = {name: dict(section) for name, section in self.settings.items()}
        for path, value in given.items():
            section, _, name = path.partition(".")
            changed.setdefault(section, {})[name] = value
        ExperimentConfig(**changed)
        self.settings = changed


def import_config(values: Values, folder: Path) -> Imported:
    """Return what a file of LLaMA-Factory or axolotl says in our words.

    Args:
        values: The file's.
        folder: Where LLaMA-Factory's `dataset_dir` is looked for.

    Raises:
        ConfigError: It is a file of neither, or what it trains, or how, has no counterpart.
    """
    tool = detect_tool(values)
    made = Imported(tool)
    given = {key: value for key, value in values.items() if value is not None}  # An empty key is one that isn't set.
    for key, (fitting, instead) in _LEARNED_OTHERWISE.items():
        if key in given and given[key] not in fitting:
            raise _refuse(key, given, instead)
    read = dict(_READ[tool](given, folder, made))
    if not any("model.name_or_path" in settings for settings in read.values()):
        raise ConfigError(f"this file of {tool} names no model.")
    for key in sorted(read, key=_in_order(read)):
        made.add(key, read[key])
        if "adapter.method" in read[key] and key in made.left_out:
            raise _refuse(key, given, made.left_out[key])
    for key, value in given.items():
        if key not in read and key not in made.left_out:
            made.left_out[key] = _explain(key, value)
    _fill(made)
    return made


def _refuse(key: str, given: Values, reason: str) -> ConfigError:
    why = " ".join(reason.split()).rstrip(".")
    return ConfigError(
        f"{key}: {given.get(key)} has {_NO_COUNTERPART}: {why}. Without this key, the rest can be imported."
    )


def detect_tool(values: Values) -> Tool:
    """Return whose file it is.

    Raises:
        ConfigError: Nobody's that is known.
    """
    for tool, (model, marks) in _MARKS.items():
        if model in values and marks & values.keys():
            return tool
    raise ConfigError(
        "this is neither a file of LLaMA-Factory (model_name_or_path with stage, finetuning_type, dataset, ...) nor of "
        "axolotl (base_model with datasets, adapter, sequence_len, ...)."
    )


def _read_llama_factory(given: Values, folder: Path, made: Imported) -> Iterator[tuple[str, Settings]]:
    if given.get("stage") == "pt":
        # Otherwise, of rows with a prompt, the answer alone would be learned.
        yield "stage", {"data.text_field": "text"}
    if "dataset" in given:
        yield "dataset", _find_files(given["dataset"], given, folder, made)
    if "eval_dataset" in given:
        held_out = _find_files(given["eval_dataset"], given, folder, made)
        sources = held_out.pop("data.sources")
        yield "eval_dataset", {**held_out, **_first_source("eval_dataset", sources, made)}
    if given.get("finetuning_type", "lora") == "lora" and "lora_alpha" not in given:
        made.filled["adapter.lora_alpha"] = 2 * given.get("lora_rank", 8)
    if given.get("pissa_init") is True:
        yield "pissa_init", {"adapter.method": "pissa"}
    yield from _read_shared(given, {"dataset", "eval_dataset", "pissa_init", "stage"}, made)


def _read_axolotl(given: Values, folder: Path, made: Imported) -> Iterator[tuple[str, Settings]]:
    if "adapter" not in given:
        yield "adapter", {"adapter.method": "full"}
    if "datasets" in given:
        yield "datasets", _read_datasets("datasets", given["datasets"], made)
    if "test_datasets" in given:
        held_out = _read_datasets("test_datasets", given["test_datasets"], made).get("data.sources", [])
        yield "test_datasets", _first_source("test_datasets", held_out, made)
    yield from _read_shared(given, {"datasets", "test_datasets"}, made)


_READ: dict[Tool, Callable[[Values, Path, Imported], Iterator[tuple[str, Settings]]]] = {
    "LLaMA-Factory": _read_llama_factory,
    "axolotl": _read_axolotl,
}


def _read_shared(given: Values, done: set[str], made: Imported) -> Iterator[tuple[str, Settings]]:
    for key, value in given.items():
        alias = find_alias(ExperimentConfig, "", key)
        if alias is None or key in done or key in _BY_ITSELF:
            continue
        try:
            if settings := alias.settle(value):
                yield key, settings
        except ConfigError as error:
            made.left_out[key] = str(error)


def _in_order(read: Mapping[str, Settings]) -> Callable[[str], int]:
    """Return a sort key: the model first, which every configuration needs, then the method, then a variant of it."""

    def rank(key: str) -> int:
        if "model.name_or_path" in read[key]:
            return 0
        method = read[key].get("adapter.method")
        return 3 if method is None else 1 if method in ("lora", "full") else 2

    return rank


def _explain(key: str, value: Any) -> str:
    if key in OUTPUT_NAMES:
        return "the folder of a run is named with -o"
    if key in _BY_ITSELF:
        return _BY_ITSELF[key]
    if key in ("optim", "optimizer"):
        return "it is AdamW, with states in 32 bits"
    if key.startswith(("wandb_", "mlflow_", "trackio_")):
        return "training.report_to names trackers; their own environment variables say the rest"
    if key.startswith(("hub_", "push_to_hub")):
        return f"{_NO_COUNTERPART}: nothing is uploaded"
    return "switched off" if value is False else "chosen by itself" if value == "auto" else _NO_COUNTERPART


def _fill(made: Imported) -> None:
    """Write out the tool's defaults for what its file leaves open and the method reads."""
    for path, value in {**_DEFAULTS[made.tool], **made.filled}.items():
        section, _, name = path.partition(".")
        steps_decide = name == "num_train_epochs" and "max_steps" in made.settings.get(section, {})
        made.filled.pop(path, None)
        if name not in made.settings.get(section, {}) and not steps_decide and made.takes({path: value}):
            made.filled[path] = value


def _find_files(names: Any, given: Values, folder: Path, made: Imported) -> Settings:
    """Return the files that dataset_info.json names, and their columns; what it doesn't know stays a name."""
    place = Path(str(given.get("dataset_dir", "data")))
    info = _read_info(folder / place / "dataset_info.json")
    sources: list[str] = []
    columns: Settings = {}
    for name in [part.strip() for part in names.split(",")] if isinstance(names, str) else map(str, names):
        entry = info.get(name, {})
        sources.append(str(place / entry["file_name"] if "file_name" in entry else entry.get("hf_hub_url", name)))
        if not entry and not Path(name).suffix:
            made.left_out[f"dataset {name}"] = (
                f"no such name in {place}/dataset_info.json; name its file in data.sources"
            )
        if entry.get("ranking") is True:
            raise ConfigError(f"dataset {name}: ranking: true has {_NO_COUNTERPART}: {_ANSWERS_AND_TEXTS}.")
        columns |= _read_columns(name, entry.get("columns", {}), columns, made)
        for key in sorted(entry.keys() - _READ_OF_ENTRIES):
            made.left_out[f"dataset {name}: {key}"] = _NO_COUNTERPART
    return {"data.sources": sources, **columns}


def _read_columns(name: str, columns: Mapping[str, str], before: Settings, made: Imported) -> Settings:
    """Return the fields that name a dataset's columns, unless these are the usual ones or others than a pair's."""
    fields = {f"data.{_FIELDS[role]}": column for role, column in columns.items() if role in _FIELDS}
    if columns.keys() == _FIELDS.keys() and before in ({}, fields):
        return fields
    if not columns.items() <= _USUAL_COLUMNS:
        made.left_out[f"dataset {name}: columns"] = (
            "data.prompt_field and data.completion_field name a pair's, the same in all sources; rename others to "
            "instruction, input and output, or messages"
        )
    return {}


def _read_info(file: Path) -> dict[str, dict[str, Any]]:
    if not file.is_file():
        return {}
    try:
        info: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} isn't JSON: {error}") from None
    return info


def _read_datasets(key: str, entries: Any, made: Imported) -> Settings:
    settings: Settings = {"data.sources": []}
    for number, entry in enumerate(entries):
        files = entry.get("data_files", [])
        settings["data.sources"] += ([files] if isinstance(files, str) else files) or [entry["path"]]
        kind = entry.get("type")
        if isinstance(kind, dict):
            made.left_out[f"{key}.{number}.type"] = "name columns with data.prompt_field and data.completion_field"
        elif kind is not None and str(kind) not in _ROW_TYPES:
            made.left_out[f"{key}.{number}.type"] = f"{kind}: {_FORMS}"
        if kind == "completion" and "field" in entry:
            settings["data.text_field"] = entry["field"]
        known = {"path", "type", "data_files", "ds_type", *(["field"] if kind == "completion" else [])}
        for name in (name for name, value in entry.items() if name not in known and value is not None):
            is_default = name == "split" and entry[name] == "train"
            made.left_out[f"{key}.{number}.{name}"] = "it is what is read" if is_default else _NO_COUNTERPART
    return settings


def _first_source(key: str, sources: list[str], made: Imported) -> Settings:
    if len(sources) > 1:
        made.left_out[f"{key}, after the first"] = "held-out rows have one source"
    return {"data.eval_source": sources[0]} if sources else {}
