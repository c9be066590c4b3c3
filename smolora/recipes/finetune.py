"""`smolora train`: a model of any task, from rows to a PEFT folder, or a model folder where all of it is trained."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from smolora.adapters.adapter_files import is_same_adapter, read_adapter
from smolora.adapters.attach import attach_adapter, is_adapted
from smolora.adapters.fast_path import fast_path
from smolora.adapters.state import AdapterWeights, copy_weights
from smolora.adapters.store import (
    find_adapter,
    follow_adapter,
    load_adapter,
    load_bundle,
    reserve_virtual_tokens,
    save_adapter,
)
from smolora.adapters.tensor_places import locate_tensors
from smolora.config import ExperimentConfig
from smolora.config.compatibility import find_float32_need
from smolora.data.collate import Layout, get_data_collator
from smolora.data.memory_rows import FROM_SOURCES, MemoryRows
from smolora.data.preprocessing import encode_rows, get_preprocessor
from smolora.data.preprocessor import DataPreprocessor
from smolora.data.sources import SourceRows, check_sources, read_dataset, read_sources
from smolora.data.task_rows import learn_form
from smolora.data.token_dataset import TokenDataset
from smolora.errors import ConfigError
from smolora.evaluation.trained_rows import write_trained_rows
from smolora.models.bundle import ModelBundle, describe_trainable_parameters
from smolora.models.end_token import choose_end_token
from smolora.models.loading import load_model
from smolora.models.packing import choose_layout
from smolora.models.quantised import describe_quantised
from smolora.models.saving import save_model
from smolora.recipes.report import leave_report
from smolora.recipes.run_folder import (
    choose_callbacks,
    fingerprint_settings,
    recorded_run,
    refuse_unmeasurable,
    restore_best,
    settle_config,
)
from smolora.recipes.verdict import broken_verdict, enforce_verdict, leave_verdict
from smolora.records.run_dir import RunDir
from smolora.records.staging import replaced_folder, retire_folder
from smolora.runtime.device import resolve_device, resolve_dtype
from smolora.runtime.memory import keep_large_blocks, return_large_blocks
from smolora.tokenizers.pretrained import fingerprint_tokenizer
from smolora.training.callback import Callback
from smolora.training.callbacks import EvaluationTimeCallback
from smolora.training.checkpoint import RunIdentity, require_one_identity
from smolora.training.optim import trainable_parameters
from smolora.training.phase_plan import build_phase_plan
from smolora.training.plan import StepPlan, plan_steps
from smolora.training.processes import Processes, join_processes
from smolora.training.sharding import require_shardable
from smolora.training.state import TrainerState
from smolora.training.strategies import TrainingStrategy
from smolora.training.trainer import Trainer

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TuningData:
    """Encoded rows, and the rows they came from."""

    rows: SourceRows
    train: TokenDataset
    held_out: TokenDataset | None
    evaluated: TokenDataset | None
    """Those of the held-out rows that an evaluation during the run reads."""
    preprocessor: DataPreprocessor


@dataclass(frozen=True)
class Tuning:
    """A run that is ready but for its folder."""

    bundle: ModelBundle
    """The base with the adapter."""
    data: TuningData
    layout: Layout
    steps: StepPlan
    identity: RunIdentity
    machine: dict[str, str]
    """What env.json says of how the run computes."""
    start: AdapterWeights | None
    """What a continued adapter begins with."""


def finetune(
    config: ExperimentConfig,
    out: Path,
    *,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    dataset: Dataset | None = None,
    eval_dataset: Dataset | None = None,
    preprocessor: DataPreprocessor | None = None,
    strategy: TrainingStrategy | None = None,
) -> RunDir:
    """Tune `config.model` on its data; return the run's folder.

    Its `adapter_checkpoint/` is a PEFT adapter; where all of the model is trained, its `model/` is a model folder.

    Args:
        config: The whole run.
        out: The run's folder.
        resume: Go on from the newest whole checkpoint.
        callbacks: Listeners of the loop.
        dataset: Rows in memory, in place of `config.data.sources`.
        eval_dataset: Held-out rows that go with `dataset`; left out, some of its own are held out.
        preprocessor: Encodes the rows, in place of the task's own; its form gives way to that of the rows.
        strategy: A learning-rate curve and listeners.

    Raises:
        ConfigError: A run is in `out` and `resume` isn't set, or a setting changed that a checkpoint depends on.
        DataError: Rows are missing, rejected or too long.
        StorageError: A source may not be read, or `out` not be written.
        ModelError: The model or adapter can't be loaded, or a checkpoint belongs to another base.
        BrokenRunError: The run can't have learned, or hasn't and `config.evaluation.require` is set.
        FailedElsewhere: Another process of the run failed.
    """
    run, strategy = RunDir(out), strategy or TrainingStrategy()
    rows = MemoryRows(dataset, eval_dataset, preprocessor)
    processes = join_processes(resolve_device(config.model.device).device)
    with processes.together():
        asked = strategy.configure(follow_adapter(config))
        config = processes.from_main(lambda: settle_config(run, asked, resume=resume, num_processes=processes.count))
        rejects = out if processes.is_main else None
        tuning = open_tuning(config, rejects, rows, num_processes=processes.count, is_sharding=processes.is_sharding)
        _refuse_unmeasured(tuning.data, config, strategy)
        require_shardable(tuning.bundle, processes)
        require_one_identity(processes.gather_values(tuning.identity))
        with ExitStack() as stack, ExitStack() as training:
            packed, sharded = tuning.layout == "packed", processes.is_sharding
            fast = training.enter_context(fast_path(tuning.bundle, config.speed, is_packed=packed, is_sharded=sharded))
            logger.info("fast path: %s", fast.describe())
            if processes.is_main:
                stack.enter_context(_recorded_tuning(run, config, tuning, fast.describe(), resume=resume))
                training.enter_context(broken_verdict(run))
            trainer = _build_trainer(run, config, tuning, callbacks, processes)
            strategy.prepare_trainer(trainer)
            state = trainer.train(resume=resume)
            processes.from_main(lambda: _finish(run, config, tuning, state, training))
    return run


def _refuse_unmeasured(data: TuningData, config: ExperimentConfig, strategy: TrainingStrategy) -> None:
    """Raise where held-out rows are needed and there are none."""
    strategy.require_held_out(is_evaluated=data.held_out is not None)
    refuse_unmeasurable(config, is_evaluated=data.held_out is not None)


@contextmanager
def _recorded_tuning(
    run: RunDir, config: ExperimentConfig, tuning: Tuning, fast_parts: str, *, resume: bool
) -> Iterator[None]:
    machine = {**tuning.machine, "fast_path": fast_parts}
    with recorded_run(run, config, resume=resume, steps=tuning.steps, identity=tuning.identity, machine=machine):
        tuning.data.rows.report.write(run.path)
        write_trained_rows(run, tuning.data.rows, started_from=(config.model.name_or_path, config.adapter.path))
        yield


def _finish(run: RunDir, config: ExperimentConfig, tuning: Tuning, state: TrainerState, training: ExitStack) -> None:
    restore_best(run, tuning.bundle, state)
    leave_results(run, config, tuning, training)
    enforce_verdict(run, config)


def leave_results(run: RunDir, config: ExperimentConfig, tuning: Tuning, training: ExitStack) -> None:
    """Leave the adapter, its verdict and the report; `training` is what was put under the model for training."""
    _save(run, tuning.bundle)
    training.close()  # The fast path is made for an adapter that is on.
    reload = None if is_adapted(tuning.bundle) else lambda: load_base(config, tuning.data.rows.fmt.labels)[0].model
    leave_verdict(run, tuning.bundle, tuning.data, config, start=tuning.start, load_base=reload)
    leave_report(run)


def open_tuning(
    config: ExperimentConfig,
    out: Path | None = None,
    memory: MemoryRows = FROM_SOURCES,
    *,
    num_processes: int = 1,
    is_sharding: bool = False,
) -> Tuning:
    """Load the base, encode the rows and attach the adapter: all that a run does before its folder is made.

    Args:
        config: The whole run.
        out: Where rejected rows are written; left out, they aren't.
        memory: Rows in memory, in place of `config.data.sources`.
        num_processes: How many share the run.
        is_sharding: Whether they will shard the base.

    Raises:
        ConfigError, DataError, StorageError, ModelError: As `finetune`.
    """
    if memory.train is None:
        check_sources(config.data)
    allocator = return_large_blocks() if is_sharding else keep_large_blocks()
    config = follow_adapter(config)
    rows = read_rows(config, out, memory)
    base, machine = load_base(config, rows.fmt.labels)
    data = encode_data(config, rows, base, memory.preprocessor)
    layout = choose_layout(base)
    steps = choose_steps(data, config, layout, num_processes)
    bundle = _adapt(base, config, data, total_steps=steps.total_steps)
    _check_phases(bundle, steps, config, is_evaluated=data.held_out is not None)
    machine |= {"allocator": allocator, "batches": layout, "processes": str(num_processes)}
    start = copy_weights(bundle) if config.adapter.path else None
    return Tuning(bundle, data, layout, steps, _identify(bundle, data, config), machine, start)


def _build_trainer(
    run: RunDir, config: ExperimentConfig, tuning: Tuning, callbacks: Sequence[Callback], processes: Processes
) -> Trainer:
    return Trainer(
        tuning.bundle,
        tuning.data.train,
        config.training,
        collate=get_data_collator(tuning.layout, tuning.bundle.task),
        eval_dataset=tuning.data.evaluated,
        evaluation=config.evaluation,
        run_dir=run,
        identity=tuning.identity,
        callbacks=choose_callbacks(run, config, [*callbacks, EvaluationTimeCallback()], is_main=processes.is_main),
        plan=tuning.steps,
        processes=processes,
    )


def show_examples(config: ExperimentConfig, *, count: int = 3) -> list[list[tuple[str, bool]]]:
    """Return the first examples as (text, is trained on) runs; nothing is written."""
    check_sources(config.data)
    config = follow_adapter(config)
    rows = read_rows(config)
    data = encode_data(config, rows, load_base(config, rows.fmt.labels)[0])
    return [data.preprocessor.render(data.train[index]) for index in range(min(count, len(data.train)))]


def load_base(config: ExperimentConfig, labels: Sequence[str] = ()) -> tuple[ModelBundle, dict[str, str]]:
    """Return the base model with the head of its task and room for virtual tokens, and why it is where and what it is.

    Raises:
        ConfigError: Virtual tokens leave no room in its context.
        ModelError: The base, or the adapter to continue, can't be read, or that one is another base's.
    """
    device, device_reason = resolve_device(config.model.device)
    needs = find_float32_need(method=config.adapter.method, quantization=config.model.quantization)
    dtype, dtype_reason = (torch.float32, needs) if needs else resolve_dtype(config.model.dtype, device)
    name, run = config.model.name_or_path, RunDir(config.model.name_or_path)
    if run.is_run(name) and not run.model.is_dir():  # An adapter's, which says itself what to do.
        base = load_bundle(name, dtype=dtype, device=str(device), quantization=config.model.quantization)
    else:
        base = load_model(
            run.model if run.is_run(name) else name,
            dtype=dtype,
            device=str(device),
            revision=config.model.revision,
            quantization=config.model.quantization,
            task=config.model.task_type,
            labels=labels,
            seed=config.training.seed,
        )
    machine = {"device": f"{device} ({device_reason})", "dtype": f"{dtype} ({dtype_reason})"}
    logger.info("device: %s; base weights: %s", machine["device"], machine["dtype"])
    if base.quantization != "none":
        machine["quantization"] = f"{base.quantization}: {describe_quantised(base.model, base.anatomy)}"
        logger.info("base in %s", machine["quantization"])
    if config.adapter.path is not None:
        continued = read_adapter(find_adapter(config.adapter.path))
        continued.refuse_other_base(base.fingerprint, base.source)
        continued.warn_of_unproved_base(base.source)
    return reserve_virtual_tokens(base, config.adapter), machine


def read_rows(config: ExperimentConfig, out: Path | None = None, memory: MemoryRows = FROM_SOURCES) -> SourceRows:
    """Read the rows and what their form learns from them; rejected rows are written to `out`, where it is given."""
    seed = config.evaluation.choose_split_seed(config.training.seed)
    adapter = read_adapter(find_adapter(config.adapter.path)) if config.adapter.path else None
    known = adapter.labels if adapter else memory.known_labels
    names = memory.label_names or (adapter.label_names if adapter else ())
    read = partial(read_sources, config.data)
    if memory.train is not None:
        read = partial(read_dataset, memory.train, config.data, eval_dataset=memory.held_out)
    rows = read(seed=seed, out=out, task=config.model.task_type, label_names=names)
    return replace(rows, fmt=learn_form(rows.train, rows.held_out, rows.fmt, known=known))


def encode_data(
    config: ExperimentConfig, rows: SourceRows, base: ModelBundle, preprocessor: DataPreprocessor | None = None
) -> TuningData:
    """Encode the rows for the model, by the preprocessor of its task where none is given."""
    fmt = rows.fmt.with_chat_template(config.data, base.tokenizer).with_labels(base.labels)
    fmt = fmt.with_end_token(choose_end_token(base)) if base.task == "causal_lm" else fmt
    rows = replace(rows, fmt=fmt)
    if preprocessor is None:
        preprocessor = get_preprocessor(base.task, fmt=fmt, tokenizer=base.tokenizer, stride=config.data.stride)
    else:
        preprocessor = preprocessor.with_format(fmt, base.tokenizer)
    encode = partial(encode_rows, fmt=fmt, tokenizer=base.tokenizer, data=config.data, context=base.context)
    train = encode(rows.train, preprocessor=preprocessor, report=rows.report, side="train")
    held_out = encode(rows.held_out, preprocessor=preprocessor, report=rows.report, side="validation") or None
    base.require_embedding(max(part.highest_id for part in (train, held_out) if part))
    most = config.data.max_validation_rows
    evaluated = held_out.spread(most) if held_out and len(rows.held_out) > most else held_out
    logger.info("rows as %s", fmt.describe())
    logger.info("%s", rows.report.describe())
    if evaluated is not held_out:
        logger.info("an evaluation during the run reads %d of these, from all parts of them", len(evaluated or ()))
    return TuningData(rows, train, held_out, evaluated, preprocessor)


def choose_steps(data: TuningData, config: ExperimentConfig, layout: Layout, num_processes: int = 1) -> StepPlan:
    """Return which rows every step sees.

    Raises:
        ConfigError: A budget of tokens where batches are padded, or below a row.
    """
    if config.speed.max_tokens_per_batch and layout == "padded":
        raise ConfigError(
            "speed.max_tokens_per_batch counts no padding, and this model trains on padded batches. "
            "Leave it out; speed.group_by_length=true makes the padding small."
        )
    steps = plan_steps(data.train.lengths, config.training, config.speed, num_processes)
    if config.speed.max_tokens_per_batch:
        logger.info(
            "passes of up to %s tokens: %.1f rows an update, of %d passes",
            f"{config.speed.max_tokens_per_batch:,}",
            steps.mean_rows,
            config.training.gradient_accumulation_steps * num_processes,
        )
    return steps


def _adapt(base: ModelBundle, config: ExperimentConfig, data: TuningData, *, total_steps: int) -> ModelBundle:
    if config.adapter.path is None:
        bundle = attach_adapter(base, config.adapter, seed=config.training.seed, total_steps=total_steps)
    else:
        if config.model.name_or_path == config.adapter.path:
            raise ConfigError("adapter.path and model.name_or_path are the same: name the base as the model.")
        bundle = load_adapter(base, find_adapter(config.adapter.path), trainable=True)
    bundle = replace(bundle, prompt_format=data.rows.fmt)
    logger.info("%s: %s", "adapter" if is_adapted(bundle) else "full", describe_trainable_parameters(bundle.model))
    return bundle


def _check_phases(bundle: ModelBundle, steps: StepPlan, config: ExperimentConfig, *, is_evaluated: bool) -> None:
    """Refuse phases that this adapter and this number of steps can't have, before there is a folder."""
    if config.phases.is_on:
        build_phase_plan(
            config.phases,
            locate_tensors(trainable_parameters(bundle.model), bundle.anatomy),
            num_layers=bundle.anatomy.num_layers,
            steps=steps,
            is_evaluated=is_evaluated,
            has_drawn_head=bundle.has_drawn_head,
        )


def _identify(bundle: ModelBundle, data: TuningData, config: ExperimentConfig) -> RunIdentity:
    return RunIdentity(
        base=bundle.fingerprint,
        tokenizer=fingerprint_tokenizer(bundle.tokenizer),
        data=data.train.fingerprint,
        held_out=data.evaluated.fingerprint if data.evaluated else "",
        settings=fingerprint_settings(config),
    )


def _save(run: RunDir, bundle: ModelBundle) -> None:
    if not is_adapted(bundle):
        with replaced_folder(run.model) as staging:
            save_model(bundle, staging)
        return
    with replaced_folder(run.adapter) as staging:
        save_adapter(bundle, staging)
        if run.merged.exists() and not is_same_adapter(staging, run.adapter):
            retire_folder(run.merged)  # Now: no kill may leave it beside the newer adapter.
            logger.info("%s was removed: it was merged from an older adapter. Merge again.", run.merged)
