"""The trial behind `smolora plan`, in a process of its own: it loads and encodes as `train` does, and takes real steps
with a run's files in a folder that is thrown away, so that memory and seconds are those of the run.

`python -m smolora.recipes.plan_trial FOLDER` reads FOLDER/request.json and writes FOLDER/result.json.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np

from smolora.adapters.fast_path import fast_path
from smolora.adapters.store import follow_adapter
from smolora.config import ExperimentConfig
from smolora.config.phases import DynamicLoRAConfig
from smolora.data.collate import get_data_collator
from smolora.data.token_dataset import TokenDataset
from smolora.errors import ConfigError, SmoloraError
from smolora.integrations.tracking import require_trackers
from smolora.recipes.estimate import Estimate, Memory, Parts, Seconds, Work
from smolora.recipes.finetune import Tuning, TuningData, leave_results, open_tuning
from smolora.recipes.plan import REQUEST, RESULT, TrialRequest
from smolora.recipes.run_folder import choose_callbacks
from smolora.recipes.verdict import expect_seconds
from smolora.records.run_dir import RunDir
from smolora.records.staging import write_json
from smolora.records.verdict_file import read_verdict
from smolora.runtime.available_memory import is_out_of_memory
from smolora.runtime.console import show_log, silence_libraries, stderr_console
from smolora.runtime.device import resolve_device
from smolora.training.plan import StepPlan
from smolora.training.trainer import Trainer
from smolora.training.trial import Room, Trial, TrialWatch, WontFitError
from smolora.training.workload import StepSize, measure_steps

_HELD_OUT_BATCHES = 8
"""Batches of held-out rows that stand for all of them."""


def main(folder: Path) -> None:
    """Answer the request in `folder`."""
    silence_libraries()
    show_log(stderr_console(quiet=True))
    _offer_to_be_killed()
    request = TrialRequest(**json.loads((folder / REQUEST).read_text(encoding="utf-8")))
    if request.tells_progress:
        logging.getLogger(TrialWatch.__module__).setLevel(logging.INFO)
    try:
        result = asdict(try_out(request, folder / "run"))
    except SmoloraError as error:
        result = {"error": type(error).__name__, "message": str(error)}
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        result = asdict(Estimate(Memory(request.available, None)))
    write_json(folder / RESULT, result)


def try_out(request: TrialRequest, folder: Path) -> Estimate:
    """Take a few steps of a run, with its files in `folder`, and return what to expect of all of it."""
    config = follow_adapter(ExperimentConfig(**request.config))
    require_trackers(config.training.report_to)
    room = Room.look(resolve_device(config.model.device).device)
    if request.available is not None:
        room = Room(room.memory, request.available)
    tuning = open_tuning(config)
    data, plan = tuning.data, tuning.steps
    sizes = measure_steps(data.train, plan, layout=tuning.layout, first=request.first_step)
    if not sizes:
        raise ConfigError(f"the run has done all of its {plan.total_steps} steps: nothing is left to plan.")
    work = _describe_work(data, plan, sizes)
    watch = TrialWatch(Trial.choose(data.train, plan, sizes, tuning.layout), room, request.patience)
    held_out = _choose_held_out(data.evaluated, config.evaluation.batch_size)
    run = RunDir(folder)
    with ExitStack() as training:
        training.enter_context(fast_path(tuning.bundle, config.speed, is_packed=tuning.layout == "packed"))
        trainer = _build_trainer(config, tuning, held_out, run, watch)
        preparation = time.time() - request.started
        try:
            trainer.train()
        except WontFitError as error:
            return Estimate(Memory(room.available, error.peak), work, parts=_describe_parts(watch))
        trained = time.perf_counter()
        leave_results(run, config, tuning, training)
        leaving = time.perf_counter() - trained
    evaluations, checkpoints = _count_pauses(plan, request.first_step, is_evaluated=held_out is not None)
    step_time = watch.fit()
    steps = sum(step_time.predict(size.tokens) for size in sizes)
    verdict, share = read_verdict(run.verdict), config.evaluation.verdict_share
    seconds = Seconds(
        preparation=preparation,
        steps=steps,
        evaluations=evaluations * watch.evaluation * _count_tokens(data.evaluated) / max(1, _count_tokens(held_out)),
        checkpoints=checkpoints * watch.checkpoint,
        verdict=expect_seconds(verdict, share, steps * plan.total_steps / len(sizes)) if verdict else 0.0,
        ending=leaving - (float(str(verdict["seconds"])) if verdict else 0.0),
    )
    memory = Memory(room.available, watch.expect_peak(len(sizes)), watch.typical_peak)
    is_measured = watch.kind == "whole steps" and memory.fits
    return Estimate(memory, work, seconds, None if is_measured else _describe_parts(watch))


def _describe_work(data: TuningData, plan: StepPlan, sizes: Sequence[StepSize]) -> Work:
    return Work(
        rows=len(data.train),
        held_out_rows=len(data.held_out or ()),
        epoch_input_tokens=data.train.num_input_tokens,
        epoch_target_tokens=data.train.num_target_tokens,
        steps=len(sizes),
        rows_per_step=round(plan.mean_rows),
        input_tokens=sum(size.tokens for size in sizes),
        longest_row=int(data.train.lengths.max()),
        longest_step_tokens=max(size.tokens for size in sizes),
    )


def _describe_parts(watch: TrialWatch) -> Parts:
    ladder, most = watch.trial.ladder, watch.trial.most_held
    if not ladder.runs:
        return Parts(0, most, 0.0)
    return Parts(0 if watch.kind == "whole steps" else ladder.last.part.tokens, most, ladder.bytes_per_token)


def _choose_held_out(rows: TokenDataset | None, size: int) -> TokenDataset | None:
    """Return batches from the whole of those that are evaluated, and the one with the most tokens."""
    if rows is None:
        return None
    batches = [range(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
    chosen = set(np.linspace(0, len(batches) - 1, _HELD_OUT_BATCHES).astype(int).tolist())
    chosen.add(int(np.argmax([rows.lengths[list(batch)].sum() for batch in batches])))
    return TokenDataset([rows[row] for number in sorted(chosen) for row in batches[number]])


def _count_tokens(rows: TokenDataset | None) -> int:
    return rows.num_input_tokens if rows else 0


def _build_trainer(
    config: ExperimentConfig, tuning: Tuning, held_out: TokenDataset | None, run: RunDir, watch: TrialWatch
) -> Trainer:
    """Return a trainer that takes the steps of the trial, then evaluates and saves.

    All of the adapter is trained: no phase takes more memory or time than that. Trackers hear nothing of it.
    """
    run.path.mkdir()
    plan, last = watch.trial.plan, watch.trial.plan.total_steps
    plan.config = config.training.replace(profile_steps=None, eval_steps=last, save_steps=last, report_to=())
    evaluation = config.evaluation.replace(early_stopping_patience=None, plateau_patience=None)
    config = config.replace(training=plan.config, evaluation=evaluation, phases=DynamicLoRAConfig())
    return Trainer(
        tuning.bundle,
        tuning.data.train,
        config.training,
        collate=get_data_collator(tuning.layout, tuning.bundle.task),
        eval_dataset=held_out,
        evaluation=config.evaluation,
        run_dir=run,
        identity=tuning.identity,
        callbacks=[*choose_callbacks(run, config, ()), watch],
        plan=plan,
    )


def _count_pauses(plan: StepPlan, first_step: int, *, is_evaluated: bool) -> tuple[int, int]:
    """Return how many evaluations and checkpoints the run has, should every evaluation be the best so far."""
    steps = range(first_step + 1, plan.total_steps + 1)
    evaluated = {step for step in steps if step % plan.eval_steps == 0 or step == plan.total_steps}
    saved = {step for step in steps if step % plan.config.save_steps == 0 or step == plan.total_steps}
    if not is_evaluated:
        return 0, len(saved)
    return len(evaluated) + (first_step == 0), len(saved | evaluated)


def _offer_to_be_killed() -> None:
    """Have the kernel end this process before any other, should memory run out after all. Linux only."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
