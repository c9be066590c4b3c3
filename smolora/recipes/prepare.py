"""The verb `prepare`: from a source to train.jsonl and validation.jsonl, with the account of every row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from smolora.config.data import DataConfig
from smolora.data.ledger import DataReport
from smolora.data.prompts import PromptFormat, rename_to_roles
from smolora.data.rows import Row
from smolora.data.sources import TRAIN_FILE, VALIDATION_FILE, read_sources
from smolora.errors import ConfigError
from smolora.records.run_dir import RunDir
from smolora.records.staging import require_writable, staged_folder


def prepare(source: str | Path, out: Path, data: DataConfig, *, seed: int = 0) -> DataReport:
    """Read, clean, chunk, deduplicate and split a source into a folder that `train` and `pretrain` read.

    The rows' columns are called by what they are for (`text`, or `prompt` and `completion`, ...), whatever the source
    calls them.

    Args:
        source: A file, a folder or a hub id.
        out: The folder to write; it appears whole or not at all. After too many rejects it holds only the account.
        data: What to do with the rows; its `sources` are replaced by `source`.
        seed: Chooses the held-out rows.

    Raises:
        ConfigError: `out` holds something already.
        DataError: The source can't be used, or too many rows were rejected.
        StorageError: `out` can't be written.
    """
    require_writable(out)
    _refuse_existing(out)
    rows = read_sources(data.replace(sources=(str(source),)), seed=seed, out=out)
    _remove_account(out)
    with staged_folder(out) as folder:
        _write_rows(rows.train, rows.fmt, folder / TRAIN_FILE)
        _write_rows(rows.held_out, rows.fmt, folder / VALIDATION_FILE)
        rows.report.write(folder)
    return rows.report


def _refuse_existing(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; the output must be a folder.")
    if out.is_dir() and (others := sorted(set(out.iterdir()) - set(_account_files(out)))):
        raise ConfigError(f"{out} holds {others[0].name} already. Choose another output folder, or remove it first.")


def _remove_account(out: Path) -> None:
    """Remove what an earlier attempt, stopped by rejected rows, left in `out`."""
    if out.is_dir():
        for file in _account_files(out):
            file.unlink(missing_ok=True)
        out.rmdir()


def _account_files(out: Path) -> list[Path]:
    return [RunDir(out).data_report, RunDir(out).rejects]


def _write_rows(rows: Sequence[Row], fmt: PromptFormat, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            # Parquet and hub rows may hold dates and other values that JSON has no form for; they are spelt out.
            file.write(json.dumps(rename_to_roles(row.values, fmt), ensure_ascii=False, default=str) + "\n")
