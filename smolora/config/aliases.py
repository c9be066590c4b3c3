"""The names that other tools have for our settings (`lora_r`, `cutoff_len`, `num_epochs`, ...), and where ours belong.

Hugging Face's arguments, LLaMA-Factory's and axolotl's files are flat, and so is memory: a setting may be given without
its section, in another one, or by its name elsewhere. It is read, and a line says what it is called here. What would
have to be guessed is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

from smolora.config.base import Section
from smolora.errors import ConfigError

logger = logging.getLogger(__name__)

Settings = dict[str, Any]
"""Values by path."""


@dataclass(frozen=True)
class Alias:
    """What another name stands for."""

    path: str
    read: Callable[[Any], Settings] | None = None
    """From its value to ours, by path; left out, the value is the same."""

    def settle(self, value: Any) -> Settings:
        """Return what it sets."""
        return {self.path: value} if self.read is None else self.read(value)


def _read_share(path: str) -> Callable[[Any], Settings]:
    def read(value: Any) -> Settings:
        if isinstance(value, int | float) and not 0 <= value < 1:
            raise ConfigError(f"{path}: a share of the whole, below 1, is meant by this name; found {value!r}.")
        return {path: value}

    return read


def _read_held_out(value: Any) -> Settings:
    if isinstance(value, int | float) and value >= 1:
        raise ConfigError(
            f"{value!r} held-out rows can't be asked for. Give their share as data.validation_fraction, with "
            "data.max_validation_rows as its bound, or a file of them as data.eval_source."
        )
    return {"data.validation_fraction": value}


def _read_switch(path: str, name: str) -> Callable[[Any], Settings]:
    def read(value: Any) -> Settings:
        if value not in (True, False, None, "auto"):
            raise ConfigError(f"{path}: this name of it is a switch, true or false; found {value!r}.")
        return {path: name} if value is True else {}  # Switched off, or `auto`, it asks for nothing.

    return read


def _read_bits(value: Any) -> Settings:
    return {"model.quantization": "none" if value is None else f"{value}bit"}


def _read_dtype(value: Any) -> Settings:
    return {"model.dtype": value.removeprefix("torch.") if isinstance(value, str) else value}


def _read_schedule(value: Any) -> Settings:
    return {"training.lr_scheduler_type": "constant" if value == "constant_with_warmup" else value}


def _read_method(value: Any) -> Settings:
    if value == "qlora":
        return {"adapter.method": "lora", "model.quantization": "4bit"}
    return {"adapter.method": value}


def _read_targets(value: Any) -> Settings:
    return {"adapter.target_modules": "all" if value in ("all-linear", ["all"], ["all-linear"]) else value}


def _read_max_steps(value: Any) -> Settings:
    return {"training.max_steps": None if value == -1 else value}  # -1 is Hugging Face's "epochs decide".


_SAME = {
    "model.name_or_path": "base_model model_name_or_path model_name base_model_name base_model_name_or_path model_id",
    "model.revision": "model_revision revision_of_model",
    "data.sources": "dataset datasets data_path train_file train_data dataset_path",
    "data.eval_source": "eval_dataset eval_data validation_file eval_file",
    "data.text_field": "dataset_text_field text_column",
    "data.prompt_field": "prompt_column",
    "data.completion_field": "completion_column response_column",
    "data.overlong": "excess_length_strategy",
    "data.max_length": "cutoff_len sequence_len max_seq_length max_seq_len model_max_length block_size",
    "adapter.r": "lora_r lora_rank rank",
    "adapter.lora_alpha": "alpha",
    "adapter.lora_dropout": "dropout",
    "adapter.path": "adapter_name_or_path lora_model_dir",
    "training.learning_rate": "lr",
    "training.num_train_epochs": "num_epochs epochs n_epochs train_epochs",
    "training.max_steps": "max_iters",
    "training.per_device_train_batch_size": "micro_batch_size train_batch_size per_gpu_train_batch_size batch_size",
    "training.gradient_accumulation_steps": "gradient_accumulation grad_accum accumulate_grad_batches",
    "training.warmup_steps": "num_warmup_steps warmup_iters",
    "training.max_grad_norm": "gradient_clip_val gradient_clipping grad_clip clip_grad_norm",
    "training.logging_steps": "log_interval",
    "training.eval_steps": "eval_interval",
    "training.gradient_checkpointing": "activation_checkpointing",
    "evaluation.batch_size": "per_device_eval_batch_size eval_batch_size",
    "gpt.num_layers": "n_layer",
    "gpt.num_heads": "n_head",
    "gpt.width": "n_embd d_model hidden_size",
    "gpt.context": "block_size context_length max_position_embeddings "
    "cutoff_len sequence_len max_seq_length max_seq_len model_max_length",
    "tokenizer.vocab_size": "vocab_size",
}
"""Names with the same value, by our path. A name may stand twice: which one it is depends on the kind of run."""

_OTHER = {
    "warmup_ratio": Alias("training.warmup_steps", _read_share("training.warmup_steps")),
    "lr_scheduler": Alias("training.lr_scheduler_type", _read_schedule),
    "val_set_size": Alias("data.validation_fraction", _read_held_out),
    "val_size": Alias("data.validation_fraction", _read_held_out),
    "load_in_4bit": Alias("model.quantization", _read_switch("model.quantization", "4bit")),
    "load_in_8bit": Alias("model.quantization", _read_switch("model.quantization", "8bit")),
    "quantization_bit": Alias("model.quantization", _read_bits),
    "bf16": Alias("model.dtype", _read_switch("model.dtype", "bfloat16")),
    "fp16": Alias("model.dtype", _read_switch("model.dtype", "float16")),
    "torch_dtype": Alias("model.dtype", _read_dtype),
    "finetuning_type": Alias("adapter.method", _read_method),
    "peft_type": Alias("adapter.method", lambda value: _read_method(str(value).lower())),
    "use_dora": Alias("adapter.method", _read_switch("adapter.method", "dora")),
    "use_rslora": Alias("adapter.method", _read_switch("adapter.method", "rslora")),
    "peft_use_dora": Alias("adapter.method", _read_switch("adapter.method", "dora")),
    "peft_use_rslora": Alias("adapter.method", _read_switch("adapter.method", "rslora")),
    "lora_target": Alias("adapter.target_modules", _read_targets),
    "lora_target_modules": Alias("adapter.target_modules", _read_targets),
    "lora_target_linear": Alias("adapter.target_modules", _read_switch("adapter.target_modules", "all")),
}
"""Names whose values are read otherwise."""

_OWN = {
    "training.max_steps": Alias("training.max_steps", _read_max_steps),
    "training.lr_scheduler_type": Alias("training.lr_scheduler_type", _read_schedule),
    "adapter.target_modules": Alias("adapter.target_modules", _read_targets),
}
"""Our own names, for values that are spelt otherwise elsewhere."""

_WHOLE = {
    "model": Alias("model.name_or_path"),
    "data": Alias("data.sources"),
    "adapter": Alias("adapter.method", _read_method),
}
"""What a section's name means with a bare value, as in `adapter: qlora`."""

_SECTIONS = {"lora": "adapter", "peft": "adapter", "dynamic_lora": "phases", "train": "training"}
"""Other names of sections."""

OUTPUT_NAMES = ("output_dir", "output_path", "out_dir")
"""Names of the run's folder, which is no setting here."""


def rename_aliases(kind: type[Section], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings under our own names, and log which others were read.

    What is no other name of anything stays as it is; the configuration refuses it.

    Raises:
        ConfigError: Two names of one setting were given, or a value that would have to be guessed.
    """
    renamed: dict[str, Any] = {}
    origin: dict[str, str] = {}
    notes: list[str] = []
    for given, section, name, value in _iter_settings(kind, values):
        own = f"{section}.{name}" if section else name
        if name in OUTPUT_NAMES:
            notes.append(f"{given} is left out, since the folder of a run is named with -o")
            continue
        alias = _OWN.get(own, Alias(own)) if own in _own_paths(kind) else find_alias(kind, section, name)
        if alias is None:
            _put(renamed, section, name, value)
            continue
        for path, setting in alias.settle(value).items():
            if path in origin and _contradict(path, (origin[path], given), _get(renamed, path), setting):
                raise ConfigError(f"{origin[path]} and {given} both set {path}: give one of them.")
            if path != given:
                notes.append(f"{given} is {path}")
            origin[path] = given
            _put(renamed, *_part(path), setting)
    if rows := origin.get("training.per_device_train_batch_size"):
        _refuse_guess(rows, renamed["training"].get("gradient_accumulation_steps", 1))
    if notes:
        logger.info("other names were read: %s", ", ".join(notes))
    return renamed


def find_alias(kind: type[Section], section: str, name: str) -> Alias | None:
    """Return what a name that isn't ours at this place stands for, or None.

    >>> from smolora.config import ExperimentConfig, PretrainConfig
    >>> find_alias(ExperimentConfig, "", "lora_r").path, find_alias(ExperimentConfig, "training", "max_length").path
    ('adapter.r', 'data.max_length')
    >>> find_alias(ExperimentConfig, "", "block_size").path, find_alias(PretrainConfig, "", "block_size").path
    ('data.max_length', 'gpt.context')

    Args:
        kind: The configuration class.
        section: Where the name was found; empty for outside of all sections.
        name: The name.
    """
    if not section and name in _WHOLE and name in kind.model_fields:
        return _WHOLE[name]
    other = _OTHER.get(name)
    if other and other.path in _own_paths(kind):
        return other
    same = [path for path, names in _SAME.items() if name in names.split() and path in _own_paths(kind)]
    if same:  # The most particular one: a GPT's context before the length of its rows.
        return _OWN.get(same[-1], Alias(same[-1]))
    elsewhere = [path for path in _own_paths(kind) if path.endswith(f".{name}")]
    training = f"training.{name}"
    path = training if training in elsewhere else elsewhere[0] if len(elsewhere) == 1 else None
    return None if path is None else _OWN.get(path, Alias(path))


def list_names(kind: type[Section]) -> list[str]:
    """Return the names that `find_alias` knows outside of all sections, ours and other tools', of what is read."""
    own = [path.rpartition(".")[2] for path in _own_paths(kind)]
    others = [name for names in _SAME.values() for name in names.split()]
    aliases = {name: find_alias(kind, "", name) for name in (*own, *others, *_OTHER)}
    return [name for name, alias in aliases.items() if alias and alias.path not in kind.unread]


def find_own_path(kind: type[Section], path: str) -> str:
    """Return the path that a path by another name stands for; itself, where it is ours or nobody's."""
    alias = None if path in _own_paths(kind) else find_alias(kind, *_part(path))
    return alias.path if alias else path


@cache
def _own_paths(kind: type[Section]) -> tuple[str, ...]:
    """Return the paths of all settings of a kind of configuration: `section.name`, or a bare name."""
    paths = []
    for name, field in kind.model_fields.items():
        members = sections_in(field.annotation)
        names = dict.fromkeys(inner for member in members for inner in member.model_fields)
        paths += [f"{name}.{inner}" for inner in names] if members else [name]
    return tuple(paths)


def sections_in(annotation: Any) -> list[type[Section]]:
    """Return the section that a field's type is, or those of which it is one."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, Section) else []
    return [section for argument in get_args(annotation) for section in sections_in(argument)]


def _iter_settings(kind: type[Section], values: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Any]]:
    """Yield (path as given, section, name, value); the section is empty for what stands outside of all."""
    for name, value in values.items():
        section = name if name in kind.model_fields else _SECTIONS.get(name, name)
        is_section = section in kind.model_fields and section not in _own_paths(kind)
        if is_section and isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", section, str(inner), setting) for inner, setting in value.items())
        else:
            yield str(name), "", str(name), value


def _contradict(path: str, names: tuple[str, str], before: object, after: object) -> bool:
    """Whether two names of one setting leave it open what was meant."""
    is_refined = path == "adapter.method" and before == "lora"  # finetuning_type: lora, and then use_dora: true.
    return path in names or not (before == after or is_refined)


def _refuse_guess(name: str, passes: object) -> None:
    if name.rpartition(".")[2] in ("batch_size", "train_batch_size") and passes != 1:
        raise ConfigError(
            f"{name} with gradient_accumulation_steps={passes}: some mean the rows of a pass by it, others those of an "
            "update. Write training.per_device_train_batch_size, the rows of a pass, or use --batch-size, those of an "
            "update."
        )


def _part(path: str) -> tuple[str, str]:
    section, _, name = path.rpartition(".")
    return section, name


def _get(values: Mapping[str, Any], path: str) -> object:
    section, name = _part(path)
    return (values[section] if section else values)[name]


def _put(values: dict[str, Any], section: str, name: str, value: Any) -> None:
    into = values.setdefault(section, {}) if section else values
    if not isinstance(into, dict):
        raise ConfigError(f"{section}: expected settings, found {into!r}.")
    into[name] = value
