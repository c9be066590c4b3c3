"""`smolora compare`: the same rows, steps and seeds for every configuration, and whether any of them is better."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from smolora.analysis.paired import PairedDifference, compare_pairs
from smolora.config import ExperimentConfig, flatten_settings
from smolora.errors import ConfigError, DataError
from smolora.recipes.finetune import finetune
from smolora.recipes.run_folder import changed_settings
from smolora.recipes.run_pool import run_on_processes, run_on_ray
from smolora.records.metrics_log import MetricsLog
from smolora.records.run_dir import RunDir
from smolora.records.staging import read_manifest, write_bytes, write_json
from smolora.records.study_dir import ComparisonDir
from smolora.training.checkpoint import RunIdentity, read_lowest

logger = logging.getLogger(__name__)

CONFIDENCE = 0.95
"""That all intervals of a comparison hold together (Bonferroni)."""

_EQUAL = (
    "model.",
    "data.",
    "evaluation.split_seed",
    "training.max_steps",
    "training.eval_steps",
    "speed.max_tokens_per_batch",
    "speed.group_by_length",
)
"""What decides about rows and steps, and about how often the lowest loss is looked for."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison."""

    name: str
    seed: int
    config: ExperimentConfig
    folder: ComparisonDir


@dataclass(frozen=True)
class Outcome:
    """What one run reached."""

    lowest: float
    """Held-out loss, in nats a token."""
    step: int
    identity: dict[str, str]
    """Of base, tokenizer and rows, as its checkpoints have it."""


@dataclass(frozen=True)
class Standing:
    """What one configuration reached."""

    name: str
    losses: tuple[float, ...]
    """The lowest held-out loss by seed, in nats a token."""
    mean: float
    against_first: PairedDifference | None
    """None for the first one itself."""


@dataclass(frozen=True)
class ComparisonResult:
    """What a comparison found."""

    seeds: tuple[int, ...]
    confidence_of_each: float
    standings: tuple[Standing, ...]


def compare(
    configs: Mapping[str, ExperimentConfig],
    out: Path,
    *,
    num_seeds: int = 5,
    workers: int = 1,
    ray_address: str | None = None,
) -> ComparisonResult:
    """Run every configuration with every seed, and hold each against the first; a killed comparison continues.

    A seed decides about initial weights, data order and dropout. The held-out rows are the same in all runs.

    Args:
        configs: By name; the names become folders.
        out: The comparison's folder.
        num_seeds: Seeds 0 to `num_seeds - 1`, in place of `training.seed`.
        workers: Processes of this machine.
        ray_address: A Ray cluster, in place of processes.

    Raises:
        ConfigError: Configurations that don't see the same rows and steps, or a folder with other ones.
        DataError: Nothing is held out, or rows changed since a run that is finished.
        StoppedBySignal: The same call continues.
    """
    _require_comparable(configs)
    if num_seeds < 2:
        raise ConfigError(f"--seeds: an interval needs 2 seeds at least, found {num_seeds}.")
    if workers < 1:
        raise ConfigError(f"--workers: at least 1, found {workers}.")
    folder, place = ComparisonDir(out), RunDir(out)
    runs = [
        PlannedRun(name, seed, _seeded(config, seed), folder)
        for seed in range(num_seeds)
        for name, config in configs.items()
    ]
    place.refuse_existing()
    for run in runs:
        _require_same(run)
    with place.locked():
        unfinished = [run for run in runs if not _is_finished(run)]
        _run_all(unfinished, len(runs), workers=workers, ray_address=ray_address)
        _require_same_rows(runs)
        comparison = _judge(list(configs), num_seeds, folder)
        _write(comparison, folder)
    return comparison


def finish_run(run: PlannedRun) -> tuple[str, int]:
    """Go on with a run to its end, and write what it reached."""
    made = finetune(run.config, run.folder.run(run.name, run.seed), resume=True)
    checkpoint = made.checkpoints()[-1].path
    lowest, step = read_lowest(checkpoint) or _find_lowest(made)
    identity = cast("dict[str, str]", read_manifest(checkpoint)["identity"])
    write_json(run.folder.outcome(run.name, run.seed), asdict(Outcome(lowest, step, identity)))
    return run.name, run.seed


def _find_lowest(run: RunDir) -> tuple[float, int]:
    """Return the lowest held-out loss of all steps, and its step, where the weights that reached it are lost."""
    losses = [
        (float(loss), int(step))
        for line in MetricsLog(run.metrics).read()
        if (step := line.get("step")) and (loss := line.get("eval_loss")) is not None
    ]
    if not losses:
        raise DataError("nothing is held out, so there is nothing to compare by: give 50 rows or data.eval_source.")
    return min(losses)


def _run_all(runs: Sequence[PlannedRun], total: int, *, workers: int, ray_address: str | None) -> None:
    if len(runs) < total:
        logger.info("%d of %d runs are finished already", total - len(runs), total)
    if not runs:
        return
    ended: Iterator[tuple[str, int]]
    if ray_address is not None:
        ended = run_on_ray(finish_run, runs, address=ray_address)
    else:
        ended = run_on_processes(finish_run, runs, workers=workers)
    for number, (name, seed) in enumerate(ended, start=total - len(runs) + 1):
        outcome = _read_outcome(runs[0].folder, name, seed)
        logger.info("%d of %d: %s, seed %d: lowest held-out loss %.4f", number, total, name, seed, outcome.lowest)


def _require_comparable(configs: Mapping[str, ExperimentConfig]) -> None:
    if len(configs) < 2:
        raise ConfigError(f"a comparison needs two configurations at least, found {len(configs)}.")
    seen = {name: _describe_work(config) for name, config in configs.items()}
    (first, expected), *others = seen.items()
    for name, found in others:
        if differing := [path for path in expected | found if expected.get(path) != found.get(path)]:
            said = "; ".join(f"{path} is {expected.get(path)} and {found.get(path)}" for path in differing)
            raise ConfigError(f"{first} and {name} don't see the same rows and steps: {said}. Make them equal.")
    for name, config in configs.items():
        if config.evaluation.early_stopping_patience is not None:
            raise ConfigError(
                f"{name}: a run that stops early computes less. Leave evaluation.early_stopping_patience away."
            )


def _describe_work(config: ExperimentConfig) -> dict[str, object]:
    """Return what must be equal for runs to see the same rows in as many steps."""
    flat = flatten_settings(config.model_dump(mode="json"))
    work = {path: value for path, value in flat.items() if path.startswith(_EQUAL)}
    if config.speed.max_tokens_per_batch:  # Which decides about the rows of a pass alone.
        work["training.gradient_accumulation_steps"] = config.training.gradient_accumulation_steps
    else:
        work["rows per step"] = config.training.rows_per_step
    if config.training.max_steps is None:
        work["training.num_train_epochs"] = config.training.num_train_epochs
    return work


def _seeded(config: ExperimentConfig, seed: int) -> ExperimentConfig:
    evaluation = config.evaluation.replace(split_seed=config.evaluation.choose_split_seed(0))
    seeded: ExperimentConfig = config.replace(training=config.training.replace(seed=seed), evaluation=evaluation)
    return seeded


def _require_same(run: PlannedRun) -> None:
    """Raise where a run of this name and seed was started with other settings."""
    made = RunDir(run.folder.run(run.name, run.seed))
    if not made.is_run(made.path):
        return
    if changes := changed_settings(made, run.config):
        said = "; ".join(f"{path} was {before!r}, now {now!r}" for path, (before, now) in changes.items())
        raise ConfigError(
            f"{made.path} was started with other settings: {said}. Choose another folder, or put them back."
        )


def _is_finished(run: PlannedRun) -> bool:
    return run.folder.outcome(run.name, run.seed).is_file()


def _require_same_rows(runs: Sequence[PlannedRun]) -> None:
    """Raise unless all runs saw the same base, training rows and held-out rows, whenever they were run."""
    seen = {(run.name, run.seed): _read_outcome(run.folder, run.name, run.seed).identity for run in runs}
    (first, expected), *others = seen.items()
    for (name, seed), found in others:
        own = {"settings": found["settings"]}  # Each configuration has its own.
        if differing := RunIdentity(**{**expected, **own}).find_difference(found):
            error, part = differing
            raise error(
                f"{name}, seed {seed}, was run on another {part} than {first[0]}, seed {first[1]}: it changed in "
                f"between. Remove {runs[0].folder.path} and compare again."
            )


def _judge(names: Sequence[str], num_seeds: int, folder: ComparisonDir) -> ComparisonResult:
    losses = {name: tuple(_read_outcome(folder, name, seed).lowest for seed in range(num_seeds)) for name in names}
    confidence = 1 - (1 - CONFIDENCE) / (len(names) - 1)
    against = losses[names[0]]
    standings = [
        Standing(
            name,
            found,
            sum(found) / num_seeds,
            compare_pairs(found, against, confidence=confidence) if name != names[0] else None,
        )
        for name, found in losses.items()
    ]
    return ComparisonResult(tuple(range(num_seeds)), confidence, tuple(standings))


def _read_outcome(folder: ComparisonDir, name: str, seed: int) -> Outcome:
    return Outcome(**json.loads(folder.outcome(name, seed).read_text(encoding="utf-8")))


def _write(comparison: ComparisonResult, folder: ComparisonDir) -> None:
    from smolora.analysis.canvas import render_png  # Here, since matplotlib takes a second.
    from smolora.analysis.comparison_plot import plot_comparison

    losses = {standing.name: standing.losses for standing in comparison.standings}
    pairs = {standing.name: standing.against_first for standing in comparison.standings if standing.against_first}
    write_bytes(folder.plot, render_png(plot_comparison(losses, pairs)))
    write_json(folder.result, to_json(comparison))


def to_json(comparison: ComparisonResult) -> dict[str, object]:
    """Return what comparison.json holds."""
    return {
        "metric": "lowest held-out loss, nats a token",
        "interval": "paired Student's t, all together (Bonferroni)",
        "confidence": CONFIDENCE,
        **asdict(comparison),
    }


def describe_comparison(comparison: ComparisonResult) -> str:
    """Return the table that a person reads."""
    first = comparison.standings[0].name
    width = max(len(standing.name) for standing in comparison.standings)
    lines = [f"{'':<{width}}  lowest held-out loss, mean of {len(comparison.seeds)} seeds"]
    for standing in comparison.standings:
        line = f"{standing.name:<{width}}  {standing.mean:.4f}"
        if (pair := standing.against_first) is not None:
            line += f"  {pair.mean:+.4f} [{pair.low:+.4f}, {pair.high:+.4f}]  {pair.verdict}"
        lines.append(line)
    lines.append(
        f"Differences to {first} by seed, with {100 * comparison.confidence_of_each:.1f} % intervals of paired t."
    )
    return "\n".join(lines)
