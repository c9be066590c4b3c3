"""How every run opens its folder: a new one is refused where a run exists, a resumed one keeps what can't change."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
import yaml

from smolora.config import ExperimentConfig, PretrainConfig, dump_config
from smolora.errors import ConfigError, ModelError
from smolora.records.run_dir import RunDir
from smolora.records.staging import write_json, write_text

logger = logging.getLogger(__name__)

RunConfig = TypeVar("RunConfig", ExperimentConfig, PretrainConfig)

_FIXED = (
    "adapter.",
    "gpt.",
    "tokenizer.",
    "model.dtype",
    "model.task_type",
    "training.seed",
    "training.per_device_train_batch_size",
    "training.gradient_accumulation_steps",
)
"""What a checkpoint depends on. Model and data may move to another path: their identity is checked instead."""

_VERSIONS = ("smolora", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors")


def settle_config(run: RunDir, config: RunConfig, *, resume: bool) -> RunConfig:
    """Return the configuration the run goes on with; creates nothing.

    Raises:
        ConfigError: A run is here and `resume` isn't set, or a setting changed that a checkpoint depends on.
        ModelError: The stored configuration can't be read.
    """
    if not resume or not run.is_run(run.path):
        run.refuse_existing()
        return config
    for path, (before, now) in _changes(_stored_config(run), config.model_dump(mode="json")).items():
        if path.startswith(_FIXED):
            raise ConfigError(
                f"{path} can't change within a run: it was {before!r}, now {now!r}. "
                "Resume with what the run started with, or start a new run in another folder."
            )
        logger.info("resuming with %s = %r (was %r)", path, now, before)
    return config


@contextmanager
def recorded_run(run: RunDir, config: RunConfig, *, resume: bool, machine: Mapping[str, str]) -> Iterator[None]:
    """Hold the run's lock and write what it is: resolved_config.yaml and env.json.

    Raises:
        FolderInUseError: Another process writes here.
    """
    with run.locked():
        if not resume:
            run.refuse_existing()
        run.sweep_leftovers()
        write_json(run.env, {**_describe_environment(), **machine})
        write_text(run.resolved_config, dump_config(config))
        yield


def _stored_config(run: RunDir) -> dict[str, object]:
    try:
        stored = yaml.safe_load(run.resolved_config.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ModelError(f"{run.resolved_config} can't be read: {error}. The run can't be resumed.") from None
    return stored if isinstance(stored, dict) else {}


def _changes(before: Mapping[str, object], now: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    old, new = _flatten(before), _flatten(now)
    return {path: (old.get(path), new[path]) for path in new if old.get(path) != new[path]}


def _flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _describe_environment() -> dict[str, object]:
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
    }
