"""What `init` chooses for the rows that it found, with the reasons, which the file that is written states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from smolora.config import ExperimentConfig
from smolora.config.dataset_size import count_updates, optimize_for_dataset_size
from smolora.data.selection import FEWEST_ROWS_TO_SPLIT, count_held_out

_OUTLIER = 2
"""Rows longer than so many times the 99 % quantile make the largest step for a hundredth of the rows."""

_SHORT = 256
"""Tokens that no row is an outlier below."""

_ROUND = 8
_WANTED = 50
"""Held-out rows that make an interval worth reading."""

_LARGEST_SHARE = 0.2

_MAIN = ("method", "r", "lora_alpha", "target_modules")
"""Settings of the adapter that are written even at their defaults."""


@dataclass(frozen=True)
class Findings:
    """What was seen of rows and model. Lengths are in tokens of the model's tokenizer."""

    form: str
    survives_cut: bool
    """Whether the beginning of a row alone can be learned from: of a plain text, and of one that gets labels."""
    rows: int
    """Rows that are kept, to learn from or to evaluate on."""
    held_out: int
    """Of those, rows that the defaults, or a source of their own, hold out."""
    is_split: bool
    """Whether the held-out rows are taken from the others, rather than given as such."""
    ledger: list[str]
    """What became of every row, line by line."""
    too_long: int
    """Rows past the longest length allowed: the model's, or the one that was set."""
    half: int
    """Half of the other rows have at most so many tokens."""
    most: int
    """And 99 % of them so many."""
    longest: int
    context: int | None

    def describe(self) -> Iterator[str]:
        """Yield what was seen, sentence by sentence."""
        yield f"Found: rows as {self.form}."
        yield from (line for line in self.ledger if not line.startswith(("kept", "train:", "validation:")))
        yield f"kept               {self.rows:>9,}"
        limit = f"; the model reads {self.context:,}" if self.context else ""
        yield (
            f"Tokens of a row: half have up to {self.half:,}, 99 % up to {self.most:,}, the longest "
            f"{self.longest:,}{limit}."
        )


def choose_settings(config: ExperimentConfig, found: Findings) -> tuple[ExperimentConfig, dict[str, str]]:
    """Return the configuration with what it leaves open chosen for the rows, and the reasons by path."""
    lengths, reasons = _choose_lengths(config, found)
    held_out, more = _choose_held_out(config, found)
    data = config.data.replace(**lengths, **held_out)
    adapter = config.adapter
    main = {name: value for name, value in adapter.model_dump().items() if name in _MAIN and adapter.path is None}
    training = config.training.replace(learning_rate=config.training.learning_rate)
    chosen: ExperimentConfig = config.replace(data=data, adapter=adapter.replace(**main), training=training)
    rows = found.rows - (count_held_out(found.rows, data) if found.is_split else found.held_out)
    chosen = optimize_for_dataset_size(chosen, rows)
    reasons |= more | _explain_size(config, chosen, rows)
    return chosen, reasons


def _choose_lengths(config: ExperimentConfig, found: Findings) -> tuple[dict[str, object], dict[str, str]]:
    fitting = "truncate" if found.survives_cut else "drop"
    why = (
        "the beginning of a text is a text"
        if found.survives_cut
        else "an answer that is cut teaches to stop anywhere; truncate keeps such rows"
    )
    chosen: dict[str, object] = {}
    reasons: dict[str, str] = {}
    if found.too_long:
        limit = config.data.max_length or found.context
        chosen["overlong"], reasons["data.overlong"] = (
            fitting,
            f"{found.too_long:,} rows have more than {limit:,} tokens; {why}.",
        )
    elif found.longest > max(_OUTLIER * found.most, _SHORT):
        chosen = {"max_length": _round_up(found.most, found), "overlong": fitting}
        reasons["data.max_length"] = (
            f"99 % of the rows, rounded up; the longest row has {found.longest / found.most:.0f} times as many tokens."
        )
        reasons["data.overlong"] = f"what to do with the others; {why}."
    else:
        chosen["max_length"] = _round_up(found.longest, found)
        reasons["data.max_length"] = "no row is longer; the longest, rounded up."
    free = {name: value for name, value in chosen.items() if name not in config.data.model_fields_set}
    return free, {path: reason for path, reason in reasons.items() if path.removeprefix("data.") in free}


def _round_up(length: int, found: Findings) -> int:
    rounded = max(-(-length // _ROUND) * _ROUND, 2)
    return min(rounded, found.context) if found.context else rounded


def _choose_held_out(config: ExperimentConfig, found: Findings) -> tuple[dict[str, object], dict[str, str]]:
    if not found.is_split:
        return {}, {}
    if found.rows < FEWEST_ROWS_TO_SPLIT:
        return {}, {
            "data.eval_source": f"{found.rows} rows are too few to hold some out; without, there is no verdict."
        }
    if "validation_fraction" in config.data.model_fields_set:
        return {}, {}
    share = max(config.data.validation_fraction, min(round(_WANTED / found.rows, 2), _LARGEST_SHARE))
    count = count_held_out(found.rows, config.data.replace(validation_fraction=share))
    return {"validation_fraction": share}, {"data.validation_fraction": f"{count:,} of {found.rows:,} rows."}


def _explain_size(config: ExperimentConfig, chosen: ExperimentConfig, rows: int) -> dict[str, str]:
    training = chosen.training
    updates = count_updates(training, rows)
    reasons = {
        "learning_rate": "the default. It depends on model and method, and was not chosen for these rows.",
        "num_train_epochs": f"{rows:,} rows to learn from; fewer rows are passed over more often.",
        "per_device_train_batch_size": f"{updates:,} updates in the run.",
    }
    free = reasons.keys() - config.training.model_fields_set
    return {f"training.{name}": reason for name, reason in reasons.items() if name in free}
