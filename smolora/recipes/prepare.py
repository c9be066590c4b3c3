"""The verb `prepare`: from a source to train.jsonl and validation.jsonl, with the account of every row."""

from __future__ import annotations

import json
import logging
from base64 import b64encode
from collections.abc import Iterable
from functools import lru_cache
from itertools import islice
from pathlib import Path

from smolora.config.data import DataConfig
from smolora.config.model import TaskType
from smolora.data.ledger import DataReport
from smolora.data.pieces import PIECE_COLUMNS
from smolora.data.prompts import PromptFormat, name_by_roles
from smolora.data.row_stream import RowStream, close_report
from smolora.data.rows import Row
from smolora.data.selection import choose_held_out
from smolora.data.source_files import TRAIN_FILE, VALIDATION_FILE
from smolora.data.sources import check_sources, stream_sources
from smolora.data.task_columns import USUAL_NAMES
from smolora.records.run_dir import RunDir
from smolora.records.staging import refuse_existing, require_writable, staged_folder
from smolora.runtime.signals import interrupting_signals

logger = logging.getLogger(__name__)


def prepare(
    source: str | Path, out: Path, data: DataConfig, *, task: TaskType = "causal_lm", seed: int = 0
) -> DataReport:
    """Read, clean, chunk, deduplicate and split a source into a folder that `train` and `pretrain` read.

    The rows' columns are called by what they are for (`text`, or `prompt` and `completion`, ...), whatever the source
    calls them.

    Args:
        source: A file, a folder or a hub id.
        out: The folder to write; it holds all or nothing of the data. After too many rejects it holds only the account.
        data: What to do with the rows; its `sources` are replaced by `source`.
        task: What a model is to learn from the rows. It decides which columns make two rows equal.
        seed: Chooses the held-out rows.

    Raises:
        ConfigError: `out` holds something already.
        DataError: The source can't be used, or too many rows were rejected.
        StorageError: `out` can't be written.
    """
    require_writable(out)
    account = RunDir(out).account  # Of an attempt that was stopped by rejected rows.
    refuse_existing(out, rewritten=account)
    data = data.replace(sources=(str(source),))
    check_sources(data)
    stream = stream_sources(data, out=out, task=task)
    with interrupting_signals(), staged_folder(out, last=TRAIN_FILE, rewritten=account) as folder:
        train, held_out = folder / TRAIN_FILE, folder / VALIDATION_FILE
        left_out: dict[str, None] = {}
        num_held_out = _write_rows(stream.held_out or (), stream.fmt, held_out, left_out)
        num_train = _write_rows(stream.train, stream.fmt, train, left_out)
        if stream.held_out is None:
            num_held_out = _hold_out(train, held_out, choose_held_out(num_train, data, seed=seed))
            num_train -= num_held_out
        close_report(stream.report, data, train=num_train, held_out=num_held_out, out=out)
        stream.report.write(folder)
        _explain_duplicates(stream, train)
    if left_out:
        names = ", ".join(map(repr, left_out))
        logger.info("left out: %s, by whose names the rows would be taken for something else.", names)
    return stream.report


def _explain_duplicates(stream: RowStream, train: Path) -> None:
    """Say what made rows equal where they have further columns, which may be what a task learns."""
    if not stream.report.duplicate or stream.fmt.kind in USUAL_NAMES:
        return
    with train.open(encoding="utf-8") as file:
        others = json.loads(file.readline()).keys() - stream.fmt.columns.keys() - set(PIECE_COLUMNS)
    if others:
        logger.info(
            "duplicates are rows equal in %s; %s made no difference. For labels, name the --task.",
            " and ".join(map(repr, stream.fmt.columns.values())),
            ", ".join(map(repr, sorted(others))),
        )


def _write_rows(rows: Iterable[Row], fmt: PromptFormat, path: Path, left_out: dict[str, None]) -> int:
    """Write rows under the names of their roles; return how many. `left_out` gets the columns that aren't written."""
    encode = json.JSONEncoder(ensure_ascii=False, check_circular=False, allow_nan=False, default=_spell_out).encode

    @lru_cache  # Most rows have the same columns.
    def choose_keys(columns: tuple[str, ...]) -> list[tuple[str, str]]:
        named = name_by_roles(columns, fmt)
        left_out.update(dict.fromkeys(column for column in columns if column not in named.values()))
        return [(f"{encode(name)}: ", column) for name, column in named.items()]

    count = 0
    with path.open("w", encoding="utf-8", newline="\n", buffering=2**18) as file:
        for row in rows:
            values = row.values
            keys = choose_keys(tuple(values))
            # The encoder takes a text by itself in two thirds of the time of an object that holds it.
            try:
                pairs = [f"{key}{encode(values[column])}" for key, column in keys]
            except ValueError:
                pairs = [f"{key}{encode(_put_null_for_nan(values[column]))}" for key, column in keys]
            file.write(f"{{{', '.join(pairs)}}}\n")
            count += 1
    return count


def _spell_out(value: object) -> str:
    """Return what stands for a value that JSON has no form for, such as a date of Parquet; bytes become base64."""
    return b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _put_null_for_nan(value: object) -> object:
    """Return what JSON makes of a value, with null for NaN and infinities at any depth."""
    found: object = json.loads(json.dumps(value, default=_spell_out), parse_constant=lambda name: None)
    return found


def _hold_out(train: Path, held_out: Path, chosen: set[int]) -> int:
    """Move the chosen lines of one file into the other, keeping their order; return how many those are.

    Which rows are held out depends on how many there are, so it is known only when all are written.
    """
    if chosen:
        whole = train.rename(train.with_suffix(".whole"))
        with whole.open("rb") as lines, train.open("wb") as kept, held_out.open("wb") as moved:
            position = 0
            for index in sorted(chosen):
                kept.writelines(islice(lines, index - position))
                moved.write(next(lines))
                position = index + 1
            kept.writelines(lines)
        whole.unlink()
    return len(chosen)
