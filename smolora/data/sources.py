"""Where rows come from: files, folders, a folder that `prepare` wrote, a hub id, a dataset in memory.

One path for all: find the files, read them, recognise the form, select, split. The type of a source is inferred from
its name; what can't be told is an error that says what would do. `datasets` and transformers cost seconds to
import, so they are imported where a Dataset is made or a tokenizer loaded, which `prepare` of a file doesn't do.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from smolora.config.data import DataConfig, FileType
from smolora.config.model import TaskType
from smolora.data.benchmark_source import is_benchmark_source, locate_benchmark, open_benchmark_source
from smolora.data.held_out_files import choose_held_out_files
from smolora.data.label_names import find_label_names, spell_labels
from smolora.data.ledger import DataReport
from smolora.data.pieces import PIECE_COLUMNS, goes_on, join_pieces
from smolora.data.prompts import PromptFormat
from smolora.data.readers import Read, check_readable
from smolora.data.row_stream import (
    RowStream,
    Source,
    check_form,
    close_report,
    columns_of,
    describe_emptiness,
    find_text_column,
    iter_alike,
    open_file,
    refuse_rowless,
    stream_rows,
)
from smolora.data.rows import Row, check_values
from smolora.data.selection import RowSelection, split_validation
from smolora.data.source_files import choose_held_out_type, describe_left_out, is_one_text, locate
from smolora.errors import DataError, suggest_path
from smolora.runtime.hub import find_hub_problem

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceRows:
    """The rows of a run."""

    train: list[Row]
    held_out: list[Row]
    fmt: PromptFormat
    report: DataReport


@dataclass(frozen=True)
class Documents:
    """The texts of a pretraining run."""

    train: list[str]
    held_out: list[str]
    report: DataReport
    is_cut: bool = False
    """Whether the last text of `train` goes on in `held_out`."""


def check_sources(data: DataConfig) -> None:
    """Raise unless every source is there and may be read: seconds, or a download, sooner than a model is loaded.

    What a folder holds beside the files that are read is said in a line.

    Raises:
        ConfigError: A source names no benchmark.
        DataError: No source is named, or one isn't there.
        StorageError: A file may not be read.
    """
    for name in list_remote_sources(data):
        load_dataset_from_hub(name)  # Once it is in the cache, reading it again costs next to nothing.
    for source, file_type in _list_sources(data):
        if left_out := describe_left_out(source, file_type):
            logger.info("%s", left_out)


def list_remote_sources(data: DataConfig) -> list[str]:
    """Return the names of sources that are the hub's; raise, as `check_sources`, unless every other one is there."""
    remote = []
    for source, file_type in _list_sources(data):
        if is_benchmark_source(source):
            check_readable(locate_benchmark(source))
        elif (found := locate(source, file_type)) is None:
            remote.append(source)
        else:
            for file, _ in found:
                check_readable(file)
    return remote


def check_first_form(data: DataConfig, task: TaskType) -> None:
    """Raise, as `check_form`, where the first of the sources is a file whose rows have no form."""
    [first, *_] = _require_sources(data)
    found = None if is_benchmark_source(first) else locate(first, data.file_type)
    if found:
        check_form(open_file(*found[0], is_whole=is_one_text(found[0][0], data)), data, task)


def read_sources(
    data: DataConfig,
    *,
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    out: Path | None = None,
    task: TaskType = "causal_lm",
    label_names: Sequence[str] = (),
) -> SourceRows:
    """Read the rows that `data` names, ready to encode.

    Args:
        data: Sources and what to do with their rows.
        seed: Chooses the held-out rows.
        tokenizer: The model's, whose chat template is used for messages.
        out: Where rejects.jsonl and data_report.json go before too many rejects stop the run.
        task: What the model learns from the rows.
        label_names: What numbers in place of labels stand for, from 0 up, where no source says it.

    Raises:
        DataError: A source, a column or rows are missing, or too many rows were rejected.
    """
    stream = stream_sources(data, tokenizer=tokenizer, out=out, task=task, label_names=label_names)
    return _gather(stream, data, seed=seed, out=out)


def read_dataset(
    dataset: Dataset,
    data: DataConfig,
    *,
    seed: int,
    eval_dataset: Dataset | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    out: Path | None = None,
    task: TaskType = "causal_lm",
    label_names: Sequence[str] = (),
) -> SourceRows:
    """Do for datasets in memory what `read_sources` does for files; `data.sources` isn't read.

    Without an `eval_dataset` the rows of `data.eval_source` are held out, if it is named.

    Raises:
        DataError: A column or rows are missing, also of those to hold out, or too many rows were rejected.
    """
    held_out = None
    if eval_dataset is not None:
        held_out = [_open_dataset(eval_dataset, "eval_dataset")]
    elif data.eval_source is not None:
        held_out = _open_held_out(data)
    train = [_open_dataset(dataset, "dataset")]
    stream = _stream(train, held_out, data, tokenizer=tokenizer, out=out, task=task, label_names=label_names)
    rows = _gather(stream, data, seed=seed, out=out)
    if eval_dataset is not None and not rows.held_out:
        raise describe_emptiness(["eval_dataset"])
    return rows


def read_source_documents(data: DataConfig, *, out: Path | None = None) -> Documents:
    """Read whole texts for pretraining: each text file is one document, each row of another type or text in pieces too.

    Nothing is held out of them, as a few long documents can't be split by rows: there are held-out texts only from an
    `eval_source` or from a prepared folder.

    Raises:
        DataError: A source, a column or text is missing, or too many rows were rejected.
    """
    report = DataReport()
    train = [part for source in _require_sources(data) for part in _open_source(source, data, is_whole=True)]
    held_out = _open_held_out(data, is_whole=True) or []
    columns = columns_of(train)
    if not columns:
        raise refuse_rowless(train, data, report, out)
    field = find_text_column(columns, data)
    fmt, named = PromptFormat(kind="text", columns={"text": field}), data.replace(text_field=field)
    chooser = RowSelection(fmt, data, report, _chunk_tokenizer(data))
    passed: set[bytes] = set()
    read = [iter_alike(part, fmt, named, "causal_lm") for part in (held_out, train)]
    rows = [chooser.select(read[0], passed), chooser.leave_out(chooser.select(read[1], set()), passed)]
    evaluated, learned = (join_pieces(part, field, report) for part in rows)
    close_report(report, data, train=len(learned), held_out=len(evaluated), out=out)
    return Documents(learned, evaluated, report)


class DatasetHandler:
    """A source as a `datasets.Dataset`, and the report of what became of its rows."""

    def __init__(
        self, source: str | Path, text_field: str = "text", chunk_size: int = 0, file_type: FileType | None = None
    ) -> None:
        """Name a file, a folder or a hub id; see `prepare_dataset`."""
        self.source = str(source)
        self.text_field = text_field
        self.config = DataConfig(
            sources=(self.source,), chunk_size=chunk_size, file_type=file_type, validation_fraction=0.0
        )
        self.report: DataReport | None = None

    def load(self) -> Dataset:
        """Read the source; the columns of its form are kept, and what says of pieces that they go on.

        Raises:
            DataError: The source or the column is missing, or a row can't be used.
        """
        from datasets import Dataset

        opened = _open_source(self.source, self.config)
        # The default column is only a default: rows of another known form stay what they are.
        is_text = self.text_field != "text" or "text" in {column.casefold() for column in columns_of(opened)}
        data = self.config.replace(text_field=self.text_field) if is_text else self.config
        rows = _gather(_stream(opened, None, data, tokenizer=None, out=None), data, seed=0, out=None)
        self.report = rows.report
        more = PIECE_COLUMNS if any(goes_on(row.values) for row in rows.train) else ()
        names = [*rows.fmt.columns.values(), *more]
        return Dataset.from_dict({name: [row.values.get(name) for row in rows.train] for name in names})


def prepare_dataset(
    source: str | Path, text_field: str = "text", chunk_size: int = 0, file_type: FileType | None = None
) -> Dataset:
    """Read a txt, csv, jsonl, json, parquet or arrow file, a folder of them, or a hub id, without duplicates.

    Args:
        source: A path or a hub id.
        text_field: The column of text, matched without regard to case.
        chunk_size: Split texts into pieces of so many words; 0 keeps rows whole.
        file_type: How to read the source; left out, it is inferred from the name.

    Raises:
        DataError: The source or the column is missing, or a row can't be used.
    """
    return DatasetHandler(source, text_field, chunk_size, file_type).load()


def load_text_data(folder: str | Path) -> Dataset:
    """Load every non-empty line of the text files under a folder as a row with a column `text`.

    Raises:
        DataError: There is no text.
    """
    return prepare_dataset(folder, file_type="txt")


def load_dataset_from_hub(name: str, split: str = "train") -> Dataset:
    """Load one split of a dataset of the Hugging Face hub; code that comes with it is never run.

    Raises:
        DataError: It doesn't exist, can't be reached, or has no such split.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    problem = find_hub_problem(name, "dataset")
    try:
        with _cache_only() if problem else nullcontext():
            return load_dataset(name, split=split)
    except ConnectionError as error:
        raise DataError(
            f"no file or folder '{name}' here, and the hub didn't give it: {problem or error}. "
            f"Check the name, or the network.{suggest_path(Path(name))}"
        ) from error
    except (OSError, ValueError, DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"can't load {name!r}, split {split!r}, from the hub: {reason}") from error


@contextmanager
def _cache_only() -> Iterator[None]:
    """Let datasets look into its cache alone inside the block; otherwise it asks the hub for half a minute."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def stream_sources(
    data: DataConfig,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    out: Path | None = None,
    task: TaskType = "causal_lm",
    label_names: Sequence[str] = (),
) -> RowStream:
    """Return the rows that `data` names one by one; see `read_sources`, which takes all of them.

    Raises:
        DataError: A source, a column or rows are missing.
    """
    train = [part for source in _require_sources(data) for part in _open_source(source, data)]
    held_out = _open_held_out(data)
    return _stream(train, held_out, data, tokenizer=tokenizer, out=out, task=task, label_names=label_names)


def _stream(
    train: Sequence[Source],
    held_out: Sequence[Source] | None,
    data: DataConfig,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    out: Path | None,
    task: TaskType = "causal_lm",
    label_names: Sequence[str] = (),
) -> RowStream:
    return stream_rows(
        train,
        held_out,
        data,
        tokenizer=tokenizer,
        chunk_tokenizer=_chunk_tokenizer(data),
        out=out,
        task=task,
        label_names=label_names,
    )


def _gather(stream: RowStream, data: DataConfig, *, seed: int, out: Path | None) -> SourceRows:
    """Read a stream to its end, and split it where nothing is held out yet."""
    named = None if stream.held_out is None else list(stream.held_out)
    rows = list(stream.train)
    learned, evaluated = split_validation(rows, data, seed=seed) if named is None else (rows, named)
    close_report(stream.report, data, train=len(learned), held_out=len(evaluated), out=out)
    return SourceRows(learned, evaluated, stream.fmt, stream.report)


def _chunk_tokenizer(data: DataConfig) -> PreTrainedTokenizerBase | None:
    if not (data.chunk_size and data.chunk_tokenizer):
        return None
    from smolora.tokenizers.pretrained import load_tokenizer

    return load_tokenizer(data.chunk_tokenizer)


def _require_sources(data: DataConfig) -> tuple[str, ...]:
    if not data.sources:
        raise DataError("no data is named. Give --data FILE_OR_DIR, or data.sources=[...] in the configuration.")
    return data.sources


def _list_sources(data: DataConfig) -> list[tuple[str, FileType | None]]:
    """Return all that is named, to learn from and to hold out, and how to read it."""
    held_out = [] if data.eval_source is None else [data.eval_source]
    return [
        *((source, data.file_type) for source in _require_sources(data)),
        *((source, choose_held_out_type(source, data.file_type)) for source in held_out),
    ]


def _open_held_out(data: DataConfig, *, is_whole: bool = False) -> list[Source] | None:
    """Open the held-out rows where they are given: by name, or beside the train.jsonl of a source."""
    if data.eval_source is not None:
        file_type = choose_held_out_type(data.eval_source, data.file_type)
        return _open_source(data.eval_source, data.replace(file_type=file_type), is_whole=is_whole)
    return [open_file(file, "jsonl") for file in choose_held_out_files(data)] or None


def _open_source(source: str, data: DataConfig, *, is_whole: bool = False) -> list[Source]:
    """Open what is learned from one source, file by file; `is_whole` reads every text file as documents."""
    if is_benchmark_source(source):
        return [open_benchmark_source(source)]
    found = locate(source, data.file_type)
    if found is None:
        return [_open_dataset(load_dataset_from_hub(source), source)]
    return [open_file(file, kind, is_whole=is_whole or is_one_text(file, data)) for file, kind in found]


def _open_dataset(dataset: Dataset, name: str) -> Source:
    names = find_label_names(dataset.features.to_dict())

    def read() -> Read:
        return (check_values(spell_labels(row, names), name, index) for index, row in enumerate(dataset, start=1))

    return Source(name, read, read_label_names=lambda: names)
