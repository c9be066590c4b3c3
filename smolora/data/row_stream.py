"""From files to usable rows one by one, so that memory doesn't grow with the data but by 16 bytes for each row.

A file is read twice where its columns can't be told from its first row: all of them decide what form the rows have,
and that decides what is cleaned and what makes two rows equal.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from smolora.config.data import DataConfig, FileType
from smolora.config.model import TaskType
from smolora.data.arrow_files import read_names_in
from smolora.data.label_names import spell_numbers
from smolora.data.labels import number_names
from smolora.data.ledger import DataReport
from smolora.data.prompts import MAY_LACK, PromptFormat, resolve_prompt_format
from smolora.data.readers import Read, iter_rows, read_columns, read_documents
from smolora.data.rows import Reject, Row, find_column
from smolora.data.selection import RowSelection
from smolora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """The records of one file or dataset, to be read as often as needed."""

    name: str
    read: Callable[[], Read]
    list_columns: Callable[[], list[str]] | None = None
    """Reads the columns of all rows; None where the first row has them all."""
    read_label_names: Callable[[], Mapping[str, Sequence[str]]] = dict
    """Reads what numbered labels are called, by column; rows have the names."""

    @cached_property
    def columns(self) -> list[str]:
        """The columns of all rows, in the order they first appear; none where there is no row."""
        return self.first_columns if self.list_columns is None else self.list_columns()

    @cached_property
    def first_columns(self) -> list[str]:
        """The columns of the first row."""
        rows = (record.values for record in self.read() if isinstance(record, Row) and record.values)
        return list(next(rows, ()))


@dataclass(frozen=True)
class RowStream:
    """The rows of a run, to be iterated once: first `held_out`, then `train`. The report counts while they pass."""

    held_out: Iterator[Row] | None
    """None where the held-out rows are still to be chosen among the others."""
    train: Iterator[Row]
    """The rows to learn from, without those that passed in `held_out`."""
    fmt: PromptFormat
    report: DataReport


def open_file(path: Path, file_type: FileType, *, is_whole: bool = False) -> Source:
    """Return a file as a source; `is_whole` reads a text file as documents and not as lines."""
    if is_whole and file_type == "txt":
        return Source(str(path), lambda: iter(read_documents(path)))
    is_mixed = file_type in ("jsonl", "json")  # Their rows may differ in their columns.
    return Source(
        str(path),
        lambda: iter_rows(path, file_type),
        (lambda: read_columns(path, file_type)) if is_mixed else None,
        lambda: read_names_in(path, file_type),
    )


def columns_of(sources: Iterable[Source]) -> list[str]:
    """Return the columns of all sources, in the order they first appear."""
    return list(dict.fromkeys(column for source in sources for column in source.columns))


def find_text_column(columns: Sequence[str], data: DataConfig) -> str:
    """Return the column of whole texts: the one that `data` names, else `text`.

    Raises:
        DataError: There is none.
    """
    try:
        return find_column(data.text_field or "text", columns)
    except DataError as error:
        raise DataError(f"{error} Name the one to read with --text-field X (data.text_field=X).") from None


def check_form(source: Source, data: DataConfig, task: TaskType) -> None:
    """Raise where the rows of `source` have no form; one row is read, and all only where that one has none.

    Raises:
        DataError: A named column is missing, or no form fits.
        ConfigError: The named fields contradict each other.
    """
    try:
        resolve_prompt_format(source.first_columns, data, task=task)
    except DataError:
        if source.columns:
            _resolve(source, data, task)


def stream_rows(
    train: Sequence[Source],
    held_out: Sequence[Source] | None,
    data: DataConfig,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    chunk_tokenizer: PreTrainedTokenizerBase | None,
    out: Path | None,
    task: TaskType = "causal_lm",
    label_names: Sequence[str] = (),
) -> RowStream:
    """Recognise the form of the rows and return them, not read yet; all sources call numbered labels by the same names.

    Those are `label_names` where no source has any.

    Raises:
        DataError: There are no rows, or no form fits, or what numbered labels are called can't be told.
    """
    report = DataReport()
    fmt = _resolve_first(train, data, tokenizer, report, out, task=task)
    sources = [*train, *(held_out or ())]
    fmt = _add_roles(sources, fmt, data, task)
    names = _find_label_names(sources, fmt, data, task) or tuple(label_names)
    fmt = fmt.model_copy(update={"label_names": names})
    chooser = RowSelection(fmt, data, report, chunk_tokenizer)
    rows = chooser.select(_iter_named(train, fmt, data, task), set())
    if held_out is None:
        return RowStream(None, rows, fmt, report)
    passed: set[bytes] = set()
    named = chooser.select(_iter_named(held_out, fmt, data, task), passed)
    return RowStream(named, chooser.leave_out(rows, passed), fmt, report)


def refuse_rowless(sources: Sequence[Source], data: DataConfig, report: DataReport, out: Path | None) -> DataError:
    """Return what to say of sources without a single row; raise instead where they hold nothing but rejects."""
    for record in chain.from_iterable(source.read() for source in sources):
        report.files[record.file] += 1
        report.rejects += [record] if isinstance(record, Reject) else []
    report.check_rejects(data.max_rejects, out)
    return describe_emptiness(data.sources)


def close_report(report: DataReport, data: DataConfig, *, train: int, held_out: int, out: Path | None) -> None:
    """Enter what was kept into the report, and raise unless it adds up to something to learn from.

    Raises:
        DataError: Too many rows were rejected, or none is left to learn from, or of those that were named to hold out.
        BrokenRunError: A row was lost or counted twice.
    """
    report.train, report.held_out = train, held_out
    report.check_rejects(data.max_rejects, out)
    report.check()
    if not train:
        raise describe_emptiness(data.sources)
    if data.eval_source is not None and not held_out:
        raise describe_emptiness([data.eval_source])


def describe_emptiness(sources: Sequence[str]) -> DataError:
    """Say the same of an empty file, of blank lines, and of rows without text."""
    named = ", ".join(sources) or "the dataset"
    return DataError(f"no rows in {named}: it is empty, or every row lacks text. Name one with text.")


def _resolve_first(
    sources: Sequence[Source],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    report: DataReport,
    out: Path | None,
    *,
    task: TaskType,
) -> PromptFormat:
    """Resolve the form of the first source that has columns; where none has, every record was rejected."""
    for source in sources:
        if source.columns:
            return _resolve(source, data, task, tokenizer)
    raise refuse_rowless(sources, data, report, out)


def _add_roles(sources: Sequence[Source], fmt: PromptFormat, data: DataConfig, task: TaskType) -> PromptFormat:
    """Return the form with roles that other sources have and the first one lacks, such as an instruction's input."""
    columns = dict(fmt.columns)
    for source in sources:
        if source.columns and (own := _resolve(source, data, task)).kind == fmt.kind:
            columns |= {role: column for role, column in own.columns.items() if role in MAY_LACK - columns.keys()}
    return fmt.model_copy(update={"columns": columns})


def _resolve(
    source: Source, data: DataConfig, task: TaskType, tokenizer: PreTrainedTokenizerBase | None = None
) -> PromptFormat:
    """Resolve the form of one source's rows; what is wrong is said with the source's name."""
    try:
        return resolve_prompt_format(source.columns, data, tokenizer, task)
    except DataError as error:
        raise DataError(f"{source.name}: {error}") from None


def _find_label_names(
    sources: Sequence[Source], fmt: PromptFormat, data: DataConfig, task: TaskType
) -> tuple[str, ...]:
    """Return what numbered labels are called; nothing where no source says it, or where all do and don't agree.

    Raises:
        DataError: Some sources don't say it, and the others don't agree.
    """
    if fmt.label_column is None:
        return ()
    found = {source.name: tuple(_read_own_names(source, data, task)) for source in sources}
    named = {name: names for name, names in found.items() if names}
    if not named:
        return ()
    (first, names), *others = named.items()
    odd = next((name for name, own in others if own != names), None)
    unnamed = next((name for name in found if name not in named), None)
    if unnamed and odd:
        raise DataError(
            f"{first} and {odd} call numbered labels by different names, so what numbers in {unnamed} mean can't "
            "be told. Write names in place of numbers there."
        )
    if unnamed and number_names(names):
        logger.info("labels of %s that are numbers are called by the names in %s: 0 is %s.", unnamed, first, names[0])
    return () if odd else names


def _read_own_names(source: Source, data: DataConfig, task: TaskType) -> Sequence[str]:
    """Return what a source's numbered labels are called; nothing where it doesn't say it."""
    names = source.read_label_names()
    if not names or not source.columns:
        return ()
    return names.get(_resolve(source, data, task).label_column or "", ())


def _iter_named(
    sources: Sequence[Source], fmt: PromptFormat, data: DataConfig, task: TaskType
) -> Iterator[Row | Reject]:
    """Yield what `iter_alike` does, with numbered labels called by their names where a source has none for them."""
    numbers = number_names(fmt.label_names)
    for source in sources:
        records = iter_alike([source], fmt, data, task)
        is_spelt = not numbers or bool(_read_own_names(source, data, task))
        yield from records if is_spelt else (_spell(record, fmt.label_column, numbers) for record in records)


def _spell(record: Row | Reject, column: str | None, numbers: Mapping[str, str]) -> Row | Reject:
    if isinstance(record, Reject) or column is None or column not in record.values:
        return record
    return record._replace(values={**record.values, column: spell_numbers(record.values[column], numbers)})


def iter_alike(
    sources: Sequence[Source], fmt: PromptFormat, data: DataConfig, task: TaskType
) -> Iterator[Row | Reject]:
    """Yield the records of all sources under the first one's column names (MR in one file may be mr in another).

    Raises:
        DataError: A source's rows have another form.
    """
    for source in sources:
        own = _resolve(source, data, task) if source.columns else fmt
        if own.kind != fmt.kind or (own.columns.keys() ^ fmt.columns.keys()) - MAY_LACK:
            raise DataError(
                f"{source.name} holds rows of the form {own.describe()}, but the first source {fmt.describe()}. "
                "Name the columns that all have, or train on one form."
            )
        renamed = {own.columns[role]: fmt.columns[role] for role in own.columns if role in fmt.columns}
        if all(old == new for old, new in renamed.items()):
            yield from source.read()
        else:
            yield from (_rename(record, renamed) for record in source.read())


def _rename(record: Row | Reject, renamed: dict[str, str]) -> Row | Reject:
    """Return a row with columns under other names, whatever else goes by those."""
    if isinstance(record, Reject):
        return record
    values = record.values
    others = {name: value for name, value in values.items() if name not in renamed and name not in renamed.values()}
    moved = {new: values[old] for old, new in renamed.items() if old in values}
    return Row({**moved, **others}, record.file, record.line)
