"""Training settings that suit a number of rows: epochs, rows an update, warm-up and intervals. What was set stays."""

from __future__ import annotations

import math
from typing import TypeVar

from smolora.config.experiment import ExperimentConfig
from smolora.config.training import TrainingConfig
from smolora.errors import ConfigError

_SIZES = ((1_000, 4, 5), (5_000, 8, 3), (50_000, 16, 2))
"""Below so many rows: rows an update, epochs."""

_LARGE = (32, 1)
"""From there on."""

_LONG = 1_000
"""Updates of a run that needs no warm-up of a tenth, and is looked at ten times rather than five."""

_LONGEST_WARMUP = 100
_LINES = 50
"""Lines of metrics that a run is to leave, and the most updates between two of them."""

_Sized = TypeVar("_Sized", ExperimentConfig, TrainingConfig)


def optimize_for_dataset_size(config: _Sized, num_rows: int) -> _Sized:
    """Return a configuration for so many rows; what `config` sets itself (`model_fields_set`) stays.

    - Below 1,000 rows: 5 epochs of 4 rows an update. Below 5,000: 3 of 8. Below 50,000: 2 of 16. Else 1 of 32. Where
      `max_steps` or a budget of tokens is set, it stands for what it replaces.
    - Warm-up: a tenth of the updates, but no more than 100.
    - Evaluations: five in a run of up to 1,000 updates, ten in a longer one, each with a checkpoint.
    - metrics.jsonl: about 50 lines, but a line every 50 updates at least.

    The learning rate isn't touched: it depends on the model and the method. These are rules of thumb, and the same
    rows may want more epochs; the held-out loss says so.

    >>> optimize_for_dataset_size(TrainingConfig(num_train_epochs=1), 800).model_dump(exclude_unset=True)
    {'num_train_epochs': 1.0, 'per_device_train_batch_size': 4, 'logging_steps': 4, 'save_steps': 40, 'eval_steps': 40}

    Args:
        config: A whole run, or its training section.
        num_rows: Rows that are learned from, the held-out ones left out.

    Raises:
        ConfigError: There is no row.
    """
    if num_rows < 1:
        raise ConfigError(f"num_rows: a run learns from one row at least, found {num_rows}.")
    if isinstance(config, TrainingConfig):
        return _set_intervals(_set_size(config, num_rows, counts_tokens=False), num_rows)
    counts_tokens = config.speed.max_tokens_per_batch is not None
    training = _set_size(config.training, num_rows, counts_tokens=counts_tokens)
    if not counts_tokens or training.max_steps:  # Else the number of updates depends on lengths.
        training = _set_intervals(training, num_rows)
    resized: ExperimentConfig = config.replace(training=training)
    return resized


def _set_size(training: TrainingConfig, num_rows: int, *, counts_tokens: bool) -> TrainingConfig:
    rows, epochs = next(((rows, epochs) for bound, rows, epochs in _SIZES if num_rows < bound), _LARGE)
    chosen: dict[str, object] = {}
    if training.max_steps is None:
        chosen["num_train_epochs"] = float(epochs)
    if not counts_tokens:
        chosen["per_device_train_batch_size"] = max(1, rows // training.gradient_accumulation_steps)
    return _add(training, chosen)


def _set_intervals(training: TrainingConfig, num_rows: int) -> TrainingConfig:
    steps = count_updates(training, num_rows)
    chosen: dict[str, object] = {"eval_steps": math.ceil(steps / (10 if steps > _LONG else 5))}
    chosen["save_steps"] = training.eval_steps or chosen["eval_steps"]
    chosen["logging_steps"] = min(max(steps // _LINES, 1), _LINES)
    if steps > _LONG:
        chosen["warmup_steps"] = _LONGEST_WARMUP
    return _add(training, chosen)


def count_updates(training: TrainingConfig, num_rows: int) -> int:
    """Return the updates of a run on one device whose passes are made of rows."""
    return training.max_steps or max(
        1, math.ceil(training.num_train_epochs * math.ceil(num_rows / training.rows_per_step))
    )


def _add(training: TrainingConfig, chosen: dict[str, object]) -> TrainingConfig:
    free = {name: value for name, value in chosen.items() if name not in training.model_fields_set}
    added: TrainingConfig = training.replace(**free)
    return added
