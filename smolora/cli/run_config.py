"""From the words and flags of `pretrain` and `train` to the configuration of the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from smolora.cli.flags import LoopFlags, collect_settings
from smolora.errors import ConfigError

if TYPE_CHECKING:
    from smolora.config import RunConfig

_ROWS_PER_PASS = "training.per_device_train_batch_size"


def build_config(kind: type[RunConfig], words: Sequence[str], flags: LoopFlags, out: Path | None) -> RunConfig:
    """Resolve the layers of a run's configuration.

    Args:
        kind: The configuration class.
        words: Positional words: at most one YAML file, and `key.path=value`.
        flags: What was given by flags; it beats the file, and a word beats it.
        out: The run's folder. Where it is resumed, its own configuration lies below all of this.

    Raises:
        ConfigError: A word that is neither, an unknown key, or a value that isn't allowed.
    """
    from smolora.config import resolve_config
    from smolora.records.run_dir import RunDir

    file, assignments = split_words(words)
    base = RunDir(out).resolved_config if flags.resume and out is not None else None
    config = resolve_config(kind, base=base, file=file, flags=collect_settings(flags), assignments=assignments)
    if flags.batch_size is None:
        return config
    if any(assignment.startswith(f"{_ROWS_PER_PASS}=") for assignment in assignments):
        raise ConfigError(
            f"--batch-size and {_ROWS_PER_PASS} both set the rows of a step. Give --batch-size alone, "
            "with training.gradient_accumulation_steps=N to split it into N passes."
        )
    resolved: RunConfig = config.replace(training=config.training.with_rows_per_step(flags.batch_size))
    return resolved


def split_words(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Return the configuration file among positional words, and the assignments.

    >>> split_words(["run.yaml", "training.seed=1"])
    (PosixPath('run.yaml'), ['training.seed=1'])

    Raises:
        ConfigError: A second file.
    """
    assignments = [word for word in words if "=" in word and not Path(word).is_file()]
    files = [word for word in words if word not in assignments]
    if len(files) > 1:
        raise ConfigError(
            f"unexpected '{files[1]}': one configuration file at most ('{files[0]}' was taken for it), "
            "and settings as key.path=value. Several data files need --data each."
        )
    return (Path(files[0]) if files else None), assignments
