"""How every run opens its folder: a new one is refused where a run exists, a resumed one keeps what can't change."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache

import torch
import yaml

from smolora.config import AdaLoRAConfig, ExperimentConfig, PretrainConfig, RunConfig, dump_config, flatten_settings
from smolora.config.experiment import drop_idle, require_kind
from smolora.errors import ConfigError, ModelError, StoppedBySignal, clause, count_of
from smolora.integrations.tracking import build_trackers, require_trackers
from smolora.models.bundle import ModelBundle
from smolora.records.gradient_log import GradientNormLog
from smolora.records.metrics_log import MetricsLog
from smolora.records.run_dir import RunDir
from smolora.records.staging import MANIFEST, find_damage, retire_folder, write_json, write_text
from smolora.runtime.signals import interrupting_signals
from smolora.training.adalora import AdaLoRACallback
from smolora.training.callback import Callback
from smolora.training.callbacks import EarlyStoppingCallback, PlateauRateCallback, ProfileCallback
from smolora.training.checkpoint import RunIdentity, load_checkpoint, require_same_count
from smolora.training.gradients import GradientNormCallback
from smolora.training.phases import DynamicLoRACallback
from smolora.training.plan import StepPlan, require_reach
from smolora.training.prefix_cache import PrefixCacheCallback
from smolora.training.schedules import resolve_warmup_steps
from smolora.training.state import TrainerState

logger = logging.getLogger(__name__)

_FIXED = (
    "adapter.",
    "gpt.",
    "tokenizer.",
    "dtype",
    "speed.",
    "model.dtype",
    "model.quantization",
    "model.task_type",
    "phases.",
    "training.seed",
    "training.per_device_train_batch_size",
    "training.gradient_accumulation_steps",
)
"""What a checkpoint depends on. Model and data may move to another path: their identity is checked instead."""

_VERSIONS = ("smolora", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors")


def settle_config(run: RunDir, config: RunConfig, *, resume: bool, num_processes: int = 1) -> RunConfig:
    """Return the configuration the run goes on with; creates nothing.

    Raises:
        ConfigError: A run is here and `resume` isn't set, a setting or number of processes changed that a checkpoint
            depends on, or a tracker isn't installed.
        ModelError: The stored configuration can't be read.
        StorageError: The folder can't be written.
    """
    if isinstance(config, ExperimentConfig) and config.speed.prefix_cache_gib and num_processes > 1:
        raise ConfigError(
            f"speed.prefix_cache_gib is kept by a run of one process, and this one has {num_processes}. Set it to 0."
        )
    require_trackers(config.training.report_to)
    run.require_usable(resume=resume)
    if not resume:
        return config
    if not run.is_started:
        logger.info("%s holds no run: starting one", run.path)
    if not run.is_run(run.path):
        return config  # Nothing to resume, or a lost configuration: then the checkpoints' identity decides.
    stored = _stored_config(run)
    require_kind(type(config), stored, run.path)
    for checkpoint in run.checkpoints():
        require_same_count(checkpoint.path, num_processes)
    changes = changed_settings(run, config)
    fixed = next((path for path in changes if path.startswith(_FIXED)), None)
    if fixed:
        before, now = changes[fixed]
        raise ConfigError(
            f"{fixed} can't change within a run: it was {before!r}, now {now!r}. "
            "Resume with what the run started with, or start a new run in another folder."
        )
    asked = config.training.max_steps  # Epochs are counted in steps later, when the rows are known.
    if asked and any(checkpoint.step > asked for checkpoint in run.checkpoints()):
        newest = run.newest_checkpoint()
        require_reach(newest.step if newest else 0, asked)
    if not run.checkpoints():
        logger.info("%s holds no checkpoint yet: starting at its first step", run.path)
    for path, (before, now) in changes.items():
        logger.info("resuming with %s = %r (was %r)", path, now, before)
    return config


def fingerprint_settings(config: ExperimentConfig | PretrainConfig) -> str:
    """Return the SHA-256 of the settings that can't change within a run, defaults left out: versions add settings."""
    chosen = flatten_settings(config.model_dump(mode="json", exclude_defaults=True))
    fixed = {path: value for path, value in chosen.items() if path.startswith(_FIXED)}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


@contextmanager
def recorded_run(
    run: RunDir, config: RunConfig, *, resume: bool, steps: StepPlan, identity: RunIdentity, machine: Mapping[str, str]
) -> Iterator[None]:
    """Hold the run's lock and write what it is: resolved_config.yaml and env.json. The main process alone does this.

    A run that is refused before its first step leaves no folder where there was none.

    Args:
        run: The run's folder.
        config: The whole run.
        resume: Whether it goes on from the newest whole checkpoint.
        steps: The run's.
        identity: What a checkpoint must have been written with.
        machine: What env.json says of how the run computes.

    Raises:
        ConfigError: A run is here and `resume` isn't set, or it has done more steps than asked for.
        ModelError, DataError: The checkpoint belongs to another base, tokenizer or data, or none is whole.
        FolderInUseError: Another process writes here.
        StoppedBySignal: A signal interrupted the block, and there is a checkpoint.
    """
    is_new = not run.path.exists()
    with run.locked(), _removed_if_refused(run, is_new=is_new):
        if not (resume and run.is_started):
            run.require_vacant()
        if resume and (checkpoint := run.newest_checkpoint()):
            # Before anything is written: a refused resume must change nothing.
            identity.require(checkpoint.path)
            require_reach(checkpoint.step, steps.total_steps)
        _name_short_warm_up(config, steps.total_steps)
        run.sweep_leftovers()
        write_json(run.env, {**_describe_environment(), **machine})
        write_text(run.resolved_config, dump_config(config))
        with _stopped_with_checkpoint(run):
            yield


@contextmanager
def _removed_if_refused(run: RunDir, *, is_new: bool) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        if is_new and not any(line.get("step") for line in MetricsLog(run.metrics).read()):
            retire_folder(run.path)
        raise


@contextmanager
def _stopped_with_checkpoint(run: RunDir) -> Iterator[None]:
    """Let a signal end what the loop doesn't answer for, such as the verdict, and name the checkpoint to go on from."""
    try:
        with interrupting_signals():
            yield
    except KeyboardInterrupt as interrupt:
        if not any((checkpoint.path / MANIFEST).is_file() for checkpoint in run.checkpoints()):
            raise
        raise StoppedBySignal(
            f"stopped at once by {str(interrupt) or 'an interrupt'}. The newest checkpoint is safe in {run.path}. "
            "Continue with --resume."
        ) from None


def _name_short_warm_up(config: RunConfig, total_steps: int) -> None:
    """Say where a run has no room for the warm-up that was asked for."""
    asked, possible = config.training.warmup_steps, resolve_warmup_steps(config.training.warmup_steps, total_steps)
    if possible < int(asked):
        words = "training.warmup_steps=%g is more than the run has room for: warm-up takes %d of its %d updates"
        logger.warning(words, asked, possible, total_steps)


def choose_callbacks(
    run: RunDir, config: ExperimentConfig | PretrainConfig, callbacks: Sequence[Callback], *, is_main: bool = True
) -> list[Callback]:
    """Return the caller's callbacks, and those that the configuration asks for; those that write in the main one."""
    chosen = list(callbacks)
    if isinstance(config, ExperimentConfig) and isinstance(config.adapter, AdaLoRAConfig):
        chosen.insert(0, AdaLoRACallback())  # First, so that others see the gradients with its penalty.
    if isinstance(config, ExperimentConfig) and config.phases.is_on:
        chosen.append(DynamicLoRACallback(config.phases, report_path=run.phase_report if is_main else None))
    if isinstance(config, ExperimentConfig) and config.speed.prefix_cache_gib:
        chosen.append(PrefixCacheCallback(run.prefix_cache, int(config.speed.prefix_cache_gib * 2**30)))
    if is_main:
        chosen.append(GradientNormCallback(GradientNormLog(run.path)))
    if config.evaluation.early_stopping_patience is not None:
        patience, threshold = config.evaluation.early_stopping_patience, config.evaluation.early_stopping_threshold
        chosen.append(EarlyStoppingCallback(patience, threshold))
    if config.evaluation.plateau_patience is not None:
        chosen.append(PlateauRateCallback(config.evaluation.plateau_patience, config.evaluation.plateau_factor))
    if config.training.profile_steps is not None and is_main:
        chosen.append(ProfileCallback(config.training.profile_steps, run.profile))
    if is_main:
        chosen += build_trackers(config.training.report_to, callbacks)
    return chosen


def refuse_unmeasurable(config: ExperimentConfig | PretrainConfig, *, is_evaluated: bool) -> None:
    """Raise where a setting waits for held-out losses that will never come.

    Raises:
        ConfigError: So it is.
    """
    for name in ("early_stopping_patience", "plateau_patience", "require"):
        if not is_evaluated and vars(config.evaluation)[name] is not None:
            raise ConfigError(
                f"evaluation.{name} looks at the held-out loss, and no rows are held out. Name some with "
                "data.eval_source (--eval-data), give more rows, or leave it out."
            )


def restore_best(run: RunDir, bundle: ModelBundle, state: TrainerState) -> None:
    """Put the weights with the lowest held-out loss into `bundle`, and say what the run reached.

    Raises:
        ModelError: Their checkpoint is damaged.
    """
    if state.best_eval_loss is None or state.best_step is None:
        measured = (
            "its held-out loss is lost" if state.base_eval_loss is not None else "nothing was held out to measure it on"
        )
        logger.info("done after %s; %s", count_of(state.step, "step"), measured)
        return
    if state.best_step != state.step:
        best = run.checkpoint_path(state.best_step)
        if damage := find_damage(best):
            raise ModelError(
                f"{best}, with the lowest held-out loss, is damaged: {damage}. Resume to go on without it."
            )
        load_checkpoint(best, bundle)
    logger.info(
        "held-out loss %.4f before, %.4f after %d of %d steps (%s%s)",
        state.base_eval_loss,
        state.best_eval_loss,
        state.best_step,
        state.step,
        "the lowest, kept" if state.has_improved else "the lowest of those, kept though the start was no worse",
        _name_early_phase(run, state.best_step),
    )
    if not state.has_improved:
        logger.warning("the held-out loss never fell below its start: this run has not learned")


def _name_early_phase(run: RunDir, step: int) -> str:
    """Return a clause on the phase of a step, where the run went on to another one."""
    lines = MetricsLog(run.metrics).read()
    phases = {line["step"]: int(line["phase"] or 0) for line in lines if line.get("phase")}
    if step not in phases or phases[step] == max(phases.values()):
        return ""
    return f"; it is of phase {phases[step]}, and what later phases trained is not in it"


def _stored_config(run: RunDir) -> dict[str, object]:
    try:
        stored = yaml.safe_load(run.resolved_config.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ModelError(f"{run.resolved_config} can't be read: {error}. The run can't be resumed.") from None
    if not isinstance(stored, dict):
        raise ModelError(f"{run.resolved_config} can't be read: it holds no settings. The run can't be resumed.")
    return stored


def changed_settings(run: RunDir, config: RunConfig) -> dict[str, tuple[object, object]]:
    """Return what `run` was started with and what it is now, by path; a setting that it didn't know was at its default.

    Raises:
        ModelError: The stored configuration can't be read.
    """
    try:
        before = type(config)(**drop_idle(type(config), _stored_config(run))[0]).model_dump(mode="json")
    except (ConfigError, TypeError) as error:
        raise ModelError(f"{run.resolved_config} can't be read: {clause(error)}. The run can't be resumed.") from None
    old, new = flatten_settings(before), flatten_settings(config.model_dump(mode="json"))
    return {path: (old.get(path), new.get(path)) for path in old | new if old.get(path) != new.get(path)}


def _describe_environment() -> dict[str, object]:
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "versions": _read_versions(),
    }


@cache
def _read_versions() -> dict[str, str]:
    """Return what is installed, which a process reads once: it takes longer than a step of a tiny model."""
    return {name: importlib.metadata.version(name) for name in _VERSIONS}
