"""The whole configuration of one run, and the layers it is resolved from: defaults, file, then what was set by hand."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import Field, model_validator

from smolora.config.adapter import AdapterConfig, LoRAConfig, keep_fitting
from smolora.config.aliases import rename_aliases, sections_in
from smolora.config.base import Section
from smolora.config.compatibility import FLOAT32_LINKS, PHASELESS, find_float32_need, find_obstacle
from smolora.config.data import DataConfig
from smolora.config.evaluation import EvaluationConfig
from smolora.config.model import DeviceName, GPTConfig, ModelConfig, TaskType, TokenizerConfig
from smolora.config.phases import DynamicLoRAConfig, resolve_starts
from smolora.config.speed import SpeedConfig
from smolora.config.training import TrainingConfig
from smolora.config.yaml_text import parse_value, read_yaml
from smolora.errors import ConfigError

logger = logging.getLogger(__name__)

_STRATEGY = {"strategy", "phase1_end", "phase2_end"}
"""Settings of phases that exclude a table."""


class ExperimentConfig(Section):
    """A tuning run: a base model, data, an adapter and how to train it."""

    model: ModelConfig
    """The base model."""

    data: DataConfig = DataConfig()
    """Training and held-out rows."""

    adapter: AdapterConfig = LoRAConfig()
    """What is trained on the base, by one of the methods."""

    training: TrainingConfig = TrainingConfig()
    """The training loop."""

    phases: DynamicLoRAConfig = DynamicLoRAConfig()
    """What trains when; left out, everything from the first step to the last."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """Evaluation during the run."""

    speed: SpeedConfig = SpeedConfig()
    """The parts of the fast path."""

    @model_validator(mode="after")
    def _phases_fit_the_steps(self) -> ExperimentConfig:
        """Refuse a phase without an update as soon as that is known: starts in epochs wait for the data."""
        steps = self.training.max_steps
        if steps is not None and not any(phase.start and phase.start.epoch for phase in self.phases.phases):
            resolve_starts(self.phases.phases, total_steps=steps, steps_per_epoch=1)
        return self

    @model_validator(mode="after")
    def _method_fits(self) -> ExperimentConfig:
        """Refuse what can't work before a model is loaded."""
        method, task, quantization = self.adapter.method, self.model.task_type, self.model.quantization
        checkpointing = self.training.gradient_checkpointing
        found = find_obstacle(method=method, task=task, quantization=quantization, gradient_checkpointing=checkpointing)
        if found:
            raise ValueError(f"adapter.method: {method} can't be used here: {found.describe()}")
        need = find_float32_need(method=method, quantization=quantization)
        see = f" See {FLOAT32_LINKS[method]}" if method in FLOAT32_LINKS else ""
        if need and self.model.dtype not in ("auto", "float32"):
            raise ValueError(
                f"model.dtype: {method} needs float32, found {self.model.dtype}: {need}. Leave it out.{see}"
            )
        if self.phases.is_on and method in PHASELESS:
            raise ValueError(f"phases: {method} can't be trained in phases: {PHASELESS[method]}. Leave them out.")
        return self

    @model_validator(mode="after")
    def _required_verdict_has_time(self) -> ExperimentConfig:
        if self.evaluation.require and not self.evaluation.verdict_share:
            raise ValueError(
                f"evaluation.require: {self.evaluation.require} asks for a verdict, and evaluation.verdict_share=0 "
                "gives it no time. Leave one of them out."
            )
        return self

    @property
    def lora(self) -> AdapterConfig:
        """The section `adapter` under its older name."""
        return self.adapter

    @property
    def dynamic_lora(self) -> DynamicLoRAConfig:
        """The section `phases` under its older name."""
        return self.phases


def _pretraining_defaults() -> TrainingConfig:
    return TrainingConfig(
        learning_rate=3e-3,
        max_steps=2000,
        per_device_train_batch_size=12,
        warmup_steps=0.05,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        save_steps=500,
    )


_WINDOWS = "the text is cut into windows of gpt.context tokens (--context)"
_WHOLE_TEXTS = "whole texts are learned, of the column that data.text_field (--text-field) names"


class PretrainConfig(Section):
    """A run that trains a tokenizer and a GPT from nothing."""

    unread: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("data.max_length", "data.overlong", "data.stride"), _WINDOWS),
        **dict.fromkeys(("data.prompt_field", "data.completion_field", "data.text_pair_field"), _WHOLE_TEXTS),
        **dict.fromkeys(("data.label_field", "data.chat_template"), _WHOLE_TEXTS),
        "evaluation.verdict_share": "a run is judged by its held-out loss, which takes no time of its own",
    }

    gpt: GPTConfig = GPTConfig()
    """The shape of the model."""

    tokenizer: TokenizerConfig = TokenizerConfig()
    """The tokenizer."""

    data: DataConfig = DataConfig()
    """The text."""

    training: TrainingConfig = Field(default_factory=_pretraining_defaults)
    """The training loop. Its own defaults: 2,000 steps of 12 rows, cosine, weight decay 0.1, a learning rate of 3e-3
    (for a width of up to about 256; beyond, take 1e-3 or less)."""

    evaluation: EvaluationConfig = EvaluationConfig(batch_size=32)
    """Evaluation during the run."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of matrix products and attention. bfloat16 is mixed precision: weights, norms, optimiser and loss stay
    float32. Where the device multiplies it natively, a step takes down to a third of the time."""

    device: DeviceName = "auto"
    """Where the run computes."""

    @model_validator(mode="after")
    def _is_read(self) -> PretrainConfig:
        """Refuse what is named in vain; at its default it may stand, as in the file of an older run."""
        _refuse_unread(self, "pretrain")
        return self


_NO_TOKENS = "tokens are counted where a model is, by train"


class PrepareConfig(Section):
    """What `smolora prepare` does with a source."""

    unread: ClassVar[Mapping[str, str]] = dict.fromkeys(("data.max_length", "data.overlong", "data.stride"), _NO_TOKENS)

    data: DataConfig = DataConfig()
    """Reading, cleaning, chunking and splitting."""

    task: TaskType = "causal_lm"
    """What a model is to learn from the rows; it decides which columns make a row, and so which rows are equal."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the split."""

    @model_validator(mode="after")
    def _is_read(self) -> PrepareConfig:
        """Refuse what is named in vain."""
        _refuse_unread(self, "prepare")
        return self


def _refuse_unread(config: Section, verb: str) -> None:
    for path in flatten_settings(config.model_dump(exclude_defaults=True)):
        if path in config.unread:
            raise ValueError(f"{path}: {verb} doesn't read it, since {config.unread[path]}. Leave it out.")


RunConfig = TypeVar("RunConfig", ExperimentConfig, PretrainConfig)
_Config = TypeVar("_Config", ExperimentConfig, PretrainConfig, PrepareConfig)


def resolve_config(
    kind: type[_Config],
    *,
    preset: Mapping[str, object] | None = None,
    base: Path | None = None,
    file: Path | None = None,
    flags: Mapping[str, object] | None = None,
    assignments: Iterable[str] = (),
) -> _Config:
    """Build a configuration from its layers; a later one wins: defaults, and the arguments in their order.

    Epochs in a later layer replace `max_steps` of an earlier one, which would decide alone, and a strategy of phases
    replaces an earlier table; flags and assignments are one layer in this. A later method keeps what it reads of an
    earlier method's settings.

    Args:
        kind: The configuration class.
        preset: Nested settings to start from.
        base: The configuration that a run was started with, where it is resumed; without that file, one is started.
        file: A YAML file with the sections of `kind`; other tools' names are read too, as in assignments.
        flags: Values by dotted path; None means not given.
        assignments: Strings such as `training.learning_rate=1e-4`; the value is read as YAML.

    Raises:
        ConfigError: A file that isn't a YAML mapping, an unknown key or a value that isn't allowed; or `base` is of the
            other verb.
    """
    values: dict[str, Any] = dict(preset or {})
    if kind is PretrainConfig:
        values["training"] = _pretraining_defaults().model_dump(exclude_unset=True)
    is_afresh = base is not None and not base.is_file()
    if base is not None and not is_afresh:
        require_kind(kind, read_yaml(base), base.parent)
    if base is not None and not is_afresh:
        stored, idle = drop_idle(kind, rename_aliases(kind, read_yaml(base)))
        if idle:
            logger.info("%s: left out, as it changes nothing: %s", base, ", ".join(idle))
        values = _lay_over(values, stored)
    if file:
        values = _lay_over(values, rename_aliases(kind, read_yaml(file)))
    values = _lay_over(values, _read_command(kind, flags or {}, assignments))
    if base is not None and is_afresh:
        _require_start(kind, values, base.parent)
    if kind is ExperimentConfig and not values.get("model"):
        raise ConfigError(
            "model.name_or_path is missing. Name the base model with --model: a folder, a run or a hub id."
        )
    return kind(**values)


def require_kind(kind: type[Section], stored: Mapping[str, object], folder: Path) -> None:
    """Raise where the settings stored in a run's folder aren't those of a run of this kind.

    Raises:
        ConfigError: They are the other verb's.
    """
    was_pretraining = "gpt" in stored
    if was_pretraining != (kind is PretrainConfig):
        verb = "pretrain" if was_pretraining else "train"
        raise ConfigError(f"{folder} holds a run of {verb}, which goes on with: smolora {verb} --resume -o {folder}")


def drop_idle(kind: type[Section], stored: Mapping[str, object]) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of a run without those that nothing reads, which older versions took, and the paths of these.

    What is left out without being named was at its default.
    """
    kept: dict[str, Any] = {name: dict(value) if isinstance(value, dict) else value for name, value in stored.items()}
    idle = []
    for name, values in kept.items():
        sections = sections_in(kind.model_fields[name].annotation) if name in kind.model_fields else []
        for section in sections if isinstance(values, dict) else []:
            unread = [path.partition(".")[2] for path in kind.unread if path.startswith(f"{name}.")]
            for setting in (*unread, *section.model_construct(**values).find_idle()):
                default = section.model_fields[setting].default
                if values.pop(setting, default) != default:
                    idle.append(f"{name}.{setting}")
    return kept, idle


def _read_command(kind: type[Section], flags: Mapping[str, object], assignments: Iterable[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for path, value in flags.items():
        if value is not None:
            _assign(values, path, value)
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator:
            raise ConfigError(f"'{assignment}' isn't key.path=value.")
        _assign(values, path.strip(), parse_value(assignment, text))
    values = rename_aliases(kind, values)
    training = _section(values, "training")
    if training.get("max_steps") is not None and "num_train_epochs" in training:
        logger.warning(
            "training.max_steps = %s decides alone; training.num_train_epochs = %s has no effect.",
            training["max_steps"],
            training["num_train_epochs"],
        )
    return values


def _lay_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    for name, section in above.items():
        if isinstance(section, dict) and not isinstance(below.get(name, {}), dict):
            raise ConfigError(f"{name}: expected settings, found {below[name]!r}.")
    values = _merge(_without_other_method(below, above), above)
    steps = _section(below, "training").get("max_steps")
    if (
        steps is not None
        and "num_train_epochs" in _section(above, "training")
        and "max_steps" not in _section(above, "training")
    ):
        values["training"]["max_steps"] = None
        epochs = values["training"]["num_train_epochs"]
        logger.info("training.num_train_epochs = %s replaces training.max_steps = %s", epochs, steps)
    if _section(below, "phases").get("table") and _STRATEGY & _section(above, "phases").keys():
        values["phases"]["table"] = []
        logger.info("a strategy replaces phases.table")
    return values


def _without_other_method(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Leave out of `below` what only its own method reads, where a later layer names another one."""
    before, method = _section(below, "adapter"), _section(above, "adapter").get("method")
    if method is None or method == before.get("method", "lora"):
        return below
    return {**below, "adapter": keep_fitting(before, method)} if before else below


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name)
    return section if isinstance(section, dict) else {}


def _require_start(kind: type[Section], values: dict[str, Any], folder: Path) -> None:
    """Raise where a run was to be resumed, is not there, and can't be started with what was given."""
    given = {"--data": _section(values, "data").get("sources")}
    if kind is ExperimentConfig:
        given = {"--model": _section(values, "model").get("name_or_path"), **given}
    if missing := [flag for flag, value in given.items() if not value]:
        raise ConfigError(f"{folder} holds no run to resume. To start one there, give {' and '.join(missing)} too.")


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {key for key in below.keys() & above.keys() if isinstance(below[key], dict) and isinstance(above[key], dict)}
    return {**below, **above, **{key: _merge(below[key], above[key]) for key in both}}


def dump_config(config: Section) -> str:
    """Return the configuration as YAML, with every default written out but of what its verb never reads."""
    unread: dict[str, Any] = {}
    for path in config.unread:
        _assign(unread, path, True)
    return yaml.safe_dump(config.model_dump(mode="json", exclude=unread), sort_keys=False, allow_unicode=True)


def flatten_settings(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return nested settings by dotted path.

    >>> flatten_settings({"training": {"seed": 0}, "device": "cpu"})
    {'training.seed': 0, 'device': 'cpu'}
    """
    flat: dict[str, object] = {}
    for key, value in values.items():
        nested = flatten_settings(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        flat.update(nested)
    return flat


def _assign(values: dict[str, Any], path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    for parent in parents:
        nested = values.setdefault(parent, {})
        if not isinstance(nested, dict):
            raise ConfigError(f"{path}: {parent} is a value, not a section.")
        values = nested
    before = values.get(leaf)
    if isinstance(before, dict) and not isinstance(value, dict):
        raise ConfigError(
            f"{path}: {value!r} would replace what is given for it too ({', '.join(map(str, before))}). Name the "
            f"setting that it is, as {path}.NAME=VALUE."
        )
    values[leaf] = _merge(before, value) if isinstance(before, dict) else value
