"""What a model is evaluated on: the rows of a benchmark, or a person's own, with the metrics that fit them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from smolora.config.data import DataConfig
from smolora.config.model import TaskType
from smolora.data.benchmark_rows import GOES_ON, BenchmarkRow, Prompt
from smolora.data.benchmarks import get_benchmark
from smolora.data.chat import is_learned
from smolora.data.pieces import goes_on
from smolora.data.prompts import PromptFormat, read_conversation, render_pair
from smolora.data.row_stream import RowStream, close_report
from smolora.data.rows import Row
from smolora.data.source_files import find_validation_file
from smolora.data.sources import check_sources, stream_sources
from smolora.errors import ConfigError, DataError, count_of
from smolora.evaluation.head_rows import HEAD_KINDS, iter_head_rows
from smolora.evaluation.metric import Resources
from smolora.records.staging import hash_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_NAMED_KINDS = ("text", "prompt_completion", "classification", "token_classification")
"""Forms whose columns a person can name."""

_FIELDS = {"tokens": "text_field", "tags": "label_field"}
"""The fields of columns whose roles have other names."""

_ANSWER_METRICS = ("bleu", "rouge", "exact_match", "distinct")


@dataclass(frozen=True, kw_only=True)
class RowSource:
    """Rows to be read as often as needed, and what goes with them."""

    name: str
    iter_rows: Callable[[], Iterator[BenchmarkRow]]
    metrics: tuple[str, ...]
    identity: dict[str, object]
    """What was asked for; `digest` is of what was found."""
    resources: Resources = field(default_factory=Resources)
    max_new_tokens: int = 200
    stop: tuple[str, ...] = ()
    label_names: tuple[str, ...] = ()
    """What the rows call labels that are numbers beneath, in the order of these."""
    stand_in: Path | None = None
    """A file that is read where the benchmark's own isn't there."""
    unanswered: set[str] = field(default_factory=set)
    """Places of conversations that hold no answer to compare with; they are left out."""

    def count(self) -> int:
        """Return the number of rows, all of which are read for it, once.

        Raises:
            DataError: There is none, or one can't be read.
        """
        return self._read_through[0]

    @property
    def digest(self) -> str:
        """SHA-256 of all prompts and references: whatever changes them, answers to the old ones aren't these rows'."""
        return self._read_through[1]

    def identify(self) -> dict[str, object]:
        """Return what was asked for and what was found."""
        return {**self.identity, "digest": self.digest}

    @cached_property
    def _read_through(self) -> tuple[int, str]:
        """Number and digest of the rows."""
        digest, num_rows = hashlib.sha256(), 0
        for row in self.iter_rows():
            digest.update(json.dumps([row.prompt, row.references], default=str).encode() + b"\n")
            num_rows += 1
        if self.unanswered:
            logger.info(
                "left out: %s without an answer of the assistant's", count_of(len(self.unanswered), "conversation")
            )
        if not num_rows:
            raise DataError(f"{self.name} has no rows to evaluate on.")
        if self.stand_in:
            logger.warning(
                "%s (%s rows) stands in for %s, whose own file isn't there: scores on it can't be held against "
                "published ones.",
                self.stand_in,
                f"{num_rows:,}",
                self.name,
            )
        return num_rows, digest.hexdigest()


def open_benchmark(
    name: str, data_dir: str | Path | None, *, split: str = "test", num_samples: int | None = None
) -> RowSource:
    """Return the rows of a benchmark's split, or the first `num_samples` of them.

    Raises:
        ConfigError: There is no such benchmark or split, or no rows are asked for.
        DataError: Its file isn't there.
    """
    limit = _describe_limit(num_samples)
    benchmark = get_benchmark(name)
    file = benchmark.find(split, data_dir)
    return RowSource(
        name=f"{benchmark.name}-{split}{limit}",
        iter_rows=lambda: islice(_with_origin(benchmark.iter_rows(split, file), file), num_samples),
        metrics=benchmark.metrics,
        identity={"benchmark": benchmark.name, "split": split, "rows": num_samples, file.name: hash_file(file)},
        resources=Resources(labels=benchmark.labels, file=file, split=benchmark.name_split(split)),
        max_new_tokens=benchmark.max_new_tokens,
        stop=benchmark.stop,
        stand_in=file if benchmark.is_stand_in(file) else None,
    )


def open_data(
    data: DataConfig,
    *,
    trained: PromptFormat | None,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskType = "causal_lm",
    num_samples: int | None = None,
) -> RowSource:
    """Return a person's own rows. Rows with the same prompt, wherever they stand, are one row of several references.

    Args:
        data: The sources and their columns; of a folder that `prepare` wrote, the held-out rows.
        trained: The form the model was trained in, whose columns are taken where no others are named, and whose names
            of numbered labels where the rows have none.
        tokenizer: Whose chat template is used for messages.
        task: What the model is asked.
        num_samples: Rows to take from the start.

    Raises:
        ConfigError: No rows are asked for.
        DataError: A source or a column isn't there.
    """
    limit = _describe_limit(num_samples)
    held_out = [find_validation_file(Path(source), data.file_type) for source in data.sources]
    sources = tuple(str(file or source) for file, source in zip(held_out, data.sources, strict=True))
    data = data.replace(sources=sources, deduplicate=False)
    check_sources(data)
    label_names = trained.label_names if trained else ()
    open_stream = partial(stream_sources, tokenizer=tokenizer, task=task, label_names=label_names)
    data = _choose_columns(data, trained, open_stream)
    fmt = open_stream(data).fmt
    if trained is not None and fmt.kind == trained.kind == "messages":
        data = data.replace(chat_template=trained.chat_template)
    files = [Path(source) for source in sources]
    unanswered: set[str] = set()
    return RowSource(
        name=f"{files[0].stem}{limit}",
        iter_rows=lambda: _iter_rows(open_stream(data), data, trained, unanswered, num_samples),
        unanswered=unanswered,
        metrics=("loss",) if fmt.kind == "text" else (*_ANSWER_METRICS, "loss"),
        label_names=fmt.label_names,
        identity={
            "rows": num_samples,
            "form": fmt.describe(),
            "files": {str(file): hash_file(file) if file.is_file() else None for file in files},
        },
    )


def _with_origin(rows: Iterable[BenchmarkRow], file: Path) -> Iterator[BenchmarkRow]:
    for number, row in enumerate(rows, start=1):
        yield replace(row, origin=f"{file}, row {number:,}")


def _choose_columns(
    data: DataConfig, trained: PromptFormat | None, open_stream: Callable[[DataConfig], RowStream]
) -> DataConfig:
    """Return `data` with the columns that the model was trained on, where none are named and those are there."""
    if trained is None or data.text_field or data.prompt_field or trained.kind not in _NAMED_KINDS:
        return data
    own = {_FIELDS.get(role, f"{role}_field"): column for role, column in trained.columns.items()}
    named: DataConfig = data.replace(**{**own, **({"label_field": data.label_field} if data.label_field else {})})
    try:
        open_stream(named)
    except DataError:
        return data
    return named


def _iter_rows(
    stream: RowStream, data: DataConfig, trained: PromptFormat | None, unanswered: set[str], num_samples: int | None
) -> Iterator[BenchmarkRow]:
    """Group rows by their prompts, the first ones or all, and raise at the end where some were rejected."""
    num_rows = 0

    def count() -> Iterator[Row]:
        nonlocal num_rows
        for row in stream.train:
            num_rows += 1
            yield row

    is_heads = stream.fmt.kind in HEAD_KINDS
    grouped = iter_head_rows(count(), stream.fmt) if is_heads else group_rows(count(), stream.fmt, trained, unanswered)
    yield from islice(grouped, num_samples)
    is_whole = num_samples is None or next(grouped, None) is None
    if len(stream.report.rejects) > data.max_rejects:
        raise DataError(f"{stream.report.describe_rejects()}\nRepair them, or take them out of the file.")
    if is_whole:  # What was read before need not add up: a row may be cut into several.
        close_report(stream.report, data, train=num_rows, held_out=0, out=None)


def group_rows(
    rows: Iterable[Row], fmt: PromptFormat, trained: PromptFormat | None, unanswered: set[str]
) -> Iterator[BenchmarkRow]:
    """Yield rows as they are asked: those with the same prompt are one of several references.

    They come when all are read, in the order of their first ones; rows without a prompt come before, each by itself.

    Args:
        rows: What was read.
        fmt: Their form.
        trained: The form the model was trained in.
        unanswered: Gets the places of conversations without an answer; of the others the last one is the reference.
    """
    grouped: dict[str, tuple[Prompt, list[str], str]] = {}
    for row in rows:
        asked, reference = read_pair(row, fmt, trained)
        if fmt.kind == "messages" and not asked:
            unanswered.add(row.origin)
        elif asked:
            grouped.setdefault(json.dumps(asked, default=str), (asked, [], row.origin))[1].append(reference)
        else:
            yield BenchmarkRow("", (reference,), {GOES_ON: True} if goes_on(row.values) else {}, row.origin)
    for asked, references, origin in grouped.values():
        yield BenchmarkRow(asked, tuple(references), origin=origin)


def read_pair(row: Row, fmt: PromptFormat, trained: PromptFormat | None) -> tuple[Prompt, str]:
    """Return what is asked by a row, and its reference; see `group_rows`.

    A conversation without an answer asks nothing.
    """
    if fmt.kind == "messages":
        messages = read_conversation(row.values, fmt)
        answers = [turn for turn, message in enumerate(messages) if is_learned(message) and message["content"]]
        return (messages[: answers[-1]], messages[answers[-1]]["content"]) if answers else ("", "")
    if fmt.kind == "instruction" and trained is not None and trained.kind == "instruction":
        given = str(row.values.get(fmt.columns.get("input", ""), "") or "")
        asked = str(row.values[fmt.columns["instruction"]])
        # The generator puts an instruction into its form, in which the input is a paragraph of its own.
        return asked + (f"\n\n### Input:\n{given}" if given.strip() else ""), render_pair(row.values, fmt)[1]
    return render_pair(row.values, fmt)


def _describe_limit(num_samples: int | None) -> str:
    if num_samples is not None and num_samples < 1:
        raise ConfigError(f"num_samples must be at least 1, found {num_samples}.")
    return "" if num_samples is None else f"-first-{num_samples}"
