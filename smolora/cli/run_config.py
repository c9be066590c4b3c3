"""From the words and flags of the verbs that read data to the configuration of the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from smolora.cli.flags import LoopFlags, collect_settings
from smolora.errors import ConfigError
from smolora.runtime.launch import launched_processes

if TYPE_CHECKING:
    from smolora.config import ExperimentConfig, RunConfig

_ROWS_PER_PASS = "training.per_device_train_batch_size"


def build_config(
    kind: type[RunConfig],
    words: Sequence[str],
    flags: LoopFlags,
    *,
    resumed: Path | None = None,
    preset: str | None = None,
    data_dir: Path | None = None,
    dataset: str | None = None,
) -> RunConfig:
    """Resolve the layers of a run's configuration.

    Args:
        kind: The configuration class.
        words: Positional words: at most one YAML file, and `key.path=value`.
        flags: What was given by flags; it beats the file, and a word beats it.
        resumed: The run that goes on: its own configuration lies below all of this but the preset.
        preset: The name of an experiment, below everything else.
        data_dir: A folder with the files of the preset's benchmark, or of `dataset`.
        dataset: A benchmark to learn from.

    Raises:
        ConfigError: A word that is neither, an unknown key, or a value that isn't allowed.
        DataError: `data_dir` lacks a file.
    """
    from smolora.config import ExperimentConfig, resolve_config
    from smolora.config.aliases import find_own_path
    from smolora.config.presets import read_preset
    from smolora.records.run_dir import RunDir

    file, assignments = split_words(words)
    base = RunDir(resumed).resolved_config if resumed else None
    settings = {**_find_data(preset, dataset, data_dir, flags), **collect_settings(flags)}
    start = read_preset(preset) if preset else None
    config = resolve_config(kind, preset=start, base=base, file=file, flags=settings, assignments=assignments)
    if flags.batch_size is None:
        return config
    if isinstance(config, ExperimentConfig) and config.speed.max_tokens_per_batch:
        raise ConfigError(
            "--batch-size counts rows, and speed.max_tokens_per_batch tokens of a pass. Give one of them."
        )
    if any(find_own_path(kind, word.partition("=")[0].strip()) == _ROWS_PER_PASS for word in assignments):
        raise ConfigError(
            f"--batch-size and {_ROWS_PER_PASS} both set the rows of a step. Give --batch-size alone, "
            "with training.gradient_accumulation_steps=N to split it into N passes."
        )
    training = config.training.with_rows_per_step(flags.batch_size, launched_processes())
    resolved: RunConfig = config.replace(training=training)
    return resolved


def require_out(out: Path | None) -> Path:
    """Return the folder of the run.

    Raises:
        ConfigError: None is given.
    """
    if out is None:
        raise ConfigError("-o is missing: the folder of the run, such as -o my-run.")
    return out


def require_start(config: RunConfig, out: Path, *, resume: bool) -> None:
    """Raise where a run can't start, or go on, in `out`, or with its data and model.

    The recipe does so too, but seconds of imports later. Of several processes it lets one speak for all.

    Raises:
        ConfigError, FolderInUseError, StorageError: As `RunDir.require_usable`.
        ConfigError, DataError, ModelError, StorageError: As `require_inputs`.
    """
    from smolora.records.run_dir import RunDir

    if launched_processes() == 1:
        RunDir(out).require_usable(resume=resume)
        require_inputs(config)


def require_inputs(config: RunConfig) -> None:
    """Raise where data or model aren't there, or the first file's rows have no form.

    Raises:
        ConfigError, DataError, StorageError: As `check_sources` and `check_form`.
        ModelError: There is no such model.
    """
    from smolora.config import ExperimentConfig
    from smolora.data.sources import check_first_form, list_remote_sources
    from smolora.models.folders import require_model

    list_remote_sources(config.data)
    if isinstance(config, ExperimentConfig):
        require_model(config.model.name_or_path, revision=config.model.revision)
        if config.adapter.path is None:  # An adapter that is continued brings its task, and so the form of its rows.
            check_first_form(config.data, config.model.task_type)


def _find_data(preset: str | None, dataset: str | None, data_dir: Path | None, flags: LoopFlags) -> dict[str, object]:
    """Return the settings that stand for `--data-dir`, and `--dataset` where it is given."""
    if data_dir is None and dataset is None:
        return {}
    if data_dir is None:
        raise ConfigError(f"--dataset {dataset} needs --data-dir: the folder with its files.")
    if flags.data or (preset is None) == (dataset is None):
        raise ConfigError(
            "--data-dir holds the files of a benchmark: give --preset NAME or --dataset NAME, and no --data."
        )
    if dataset is not None:
        from smolora.data.benchmark_source import name_sources

        return name_sources(dataset, data_dir)
    assert preset is not None, "one of the two is given"
    from smolora.config.presets import name_benchmark
    from smolora.data.benchmarks import find_benchmark_files

    train, held_out = find_benchmark_files(name_benchmark(preset), data_dir)
    return {"data.sources": (str(train),), "data.eval_source": str(held_out)}


def read_configs(words: Sequence[str]) -> dict[str, ExperimentConfig]:
    """Return the configurations of several files by the files' names, with settings that hold for all.

    Raises:
        ConfigError: Two files of one name, an unknown key, or a value that isn't allowed.
    """
    from smolora.config import ExperimentConfig, resolve_config

    files, assignments = _part_words(words)
    configs: dict[str, ExperimentConfig] = {}
    for file in files:
        if file.stem in configs:
            raise ConfigError(f"two configurations are named '{file.stem}', and names become folders. Rename one.")
        configs[file.stem] = resolve_config(ExperimentConfig, file=file, assignments=assignments)
    return configs


def _part_words(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    assignments = [word for word in words if "=" in word and not Path(word).is_file()]
    return [Path(word) for word in words if word not in assignments], assignments


def require_assignments(words: Sequence[str], source: str) -> list[str]:
    """Return the words behind a source, which are assignments.

    >>> require_assignments(["data.max_rejects=1"], "a.txt")
    ['data.max_rejects=1']

    Raises:
        ConfigError: One isn't, such as a second file.
    """
    others, assignments = _part_words(words)
    if others:
        raise ConfigError(
            f"unexpected '{others[0]}': one source ('{source}' was taken for it), and settings as data.key=value. To "
            "read several files, name their folder, with --file-type where it holds others too."
        )
    return assignments


def split_words(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Return the configuration file among positional words, and the assignments.

    >>> split_words(["run.yaml", "training.seed=1"])
    (PosixPath('run.yaml'), ['training.seed=1'])

    Raises:
        ConfigError: A second file.
    """
    files, assignments = _part_words(words)
    if len(files) > 1:
        raise ConfigError(
            f"unexpected '{files[1]}': one configuration file at most ('{files[0]}' was taken for it), "
            "and settings as key.path=value. Several data files need --data each."
        )
    return (files[0] if files else None), assignments
