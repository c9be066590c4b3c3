"""`smolora init`: look at the data as `train` would, and write a commented configuration that it takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from smolora.adapters.store import follow_adapter
from smolora.config import ExperimentConfig
from smolora.config.annotated import annotate_config
from smolora.data.held_out_files import find_held_out_files
from smolora.data.sources import check_sources
from smolora.errors import ConfigError
from smolora.models.bundle import ModelBundle
from smolora.recipes.finetune import TuningData, encode_data, load_base, read_rows
from smolora.recipes.init_choices import Findings, choose_settings
from smolora.records.staging import require_writable, write_text

_OFTEN = (
    "model.dtype",
    "model.quantization",
    "data.eval_source",
    "data.overlong",
    "adapter.lora_dropout",
    "training.max_steps",
    "training.gradient_accumulation_steps",
    "training.warmup_steps",
    "training.lr_scheduler_type",
    "training.gradient_checkpointing",
    "training.seed",
    "phases.strategy",
    "evaluation.early_stopping_patience",
    "evaluation.require",
)
"""What people look for next; it is shown with its default."""


def init(config: ExperimentConfig, out: Path) -> ExperimentConfig:
    """Write a configuration for the data at hand to the file `out`, and return it; what `config` sets stays.

    The base is loaded and the rows are encoded as `train` does it, so what would end a run before its first step ends
    this too.

    Raises:
        ConfigError: `out` exists, or the configuration can't be used.
        DataError: Rows are missing, rejected or too long.
        ModelError: The model can't be loaded.
        StorageError: `out` can't be written.
    """
    if out.exists():
        raise ConfigError(f"{out} exists, and is left as it is. Name another file with -o.")
    if not out.parent.is_dir():
        raise ConfigError(f"there is no folder {out.parent} to write {out.name} into. Make it, or name another file.")
    require_writable(out.parent)
    check_sources(config.data)
    config = follow_adapter(config)
    rows = read_rows(config)
    base, _ = load_base(config, rows.fmt.labels)
    data = encode_data(_with_long_rows_left_out(config), rows, base)
    found = _look(config, data, base)
    chosen, reasons = choose_settings(config, found)
    head = (
        f"A tuning run, proposed for its data: smolora train {out} -o RUN",
        "A line such as '#name: value' shows a default. What else there is: docs/config.md, smolora config --schema.",
        *found.describe(),
    )
    others = [path for path in _OFTEN if not (config.adapter.path and path.startswith("adapter."))]
    write_text(out, annotate_config(chosen, head=head, reasons=reasons, others=others))
    return chosen


def _with_long_rows_left_out(config: ExperimentConfig) -> ExperimentConfig:
    """Return the configuration with rows past the longest length counted, unless it says what to do with them."""
    if "overlong" in config.data.model_fields_set:
        return config
    counting: ExperimentConfig = config.replace(data=config.data.replace(overlong="drop"))
    return counting


def _look(config: ExperimentConfig, data: TuningData, base: ModelBundle) -> Findings:
    parts = [data.train.lengths, *([data.held_out.lengths] if data.held_out else [])]
    lengths = np.concatenate(parts)
    half, most = (int(np.quantile(lengths, share, method="higher")) for share in (0.5, 0.99))
    report = data.rows.report
    return Findings(
        form=data.rows.fmt.describe(),
        survives_cut=data.rows.fmt.kind == "text" or base.task in ("classification", "token_classification"),
        rows=report.kept,
        held_out=report.held_out,
        is_split=config.data.eval_source is None and not find_held_out_files(config.data),
        ledger=report.describe().splitlines(),
        too_long=sum(counts.dropped_overlong for counts in report.encoded.values()),
        half=half,
        most=most,
        longest=int(lengths.max()),
        context=base.context,
    )
