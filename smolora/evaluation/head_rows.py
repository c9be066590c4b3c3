"""Rows of a person's own as the head of a task is asked them, with what is right as the references."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import cast

from smolora.data.benchmark_rows import ASKED, TAGS, TEXTS, WORDS, BenchmarkRow, ask_about
from smolora.data.labels import iter_labels
from smolora.data.prompts import Kind, PromptFormat
from smolora.data.rows import Row
from smolora.data.task_rows import read_answers
from smolora.errors import DataError

Asked = Mapping[str, object]
"""A question, its context, and its answers where they are known."""


def iter_head_rows(rows: Iterable[Row], fmt: PromptFormat) -> Iterator[BenchmarkRow]:
    """Yield rows of a form of `HEAD_KINDS`, each as it is asked."""
    make = _MAKERS[fmt.kind]
    return (make(row, fmt) for row in rows)


def _make_labelled(row: Row, fmt: PromptFormat) -> BenchmarkRow:
    texts = tuple(str(row.values[fmt.columns[role]]) for role in ("text", "text_pair") if role in fmt.columns)
    return BenchmarkRow("\n".join(texts), tuple(iter_labels(row.values, fmt)), {TEXTS: texts}, row.origin)


def _make_tagged(row: Row, fmt: PromptFormat) -> BenchmarkRow:
    words = tuple(cast("list[str]", row.values[fmt.columns["tokens"]]))
    return tag_words(words, tuple(iter_labels(row.values, fmt)), origin=row.origin)


def tag_words(words: tuple[str, ...], tags: tuple[str, ...], *, origin: str = "") -> BenchmarkRow:
    """Return the row of words with the right label of each; its prompt and its reference are for people."""
    return BenchmarkRow(" ".join(words), (" ".join(tags),), {WORDS: words, TAGS: tags}, origin)


def _make_question(row: Row, fmt: PromptFormat) -> BenchmarkRow:
    asked = {role: row.values[column] for role, column in fmt.columns.items()}
    return ask_about(asked, [text for text, _ in read_answers(asked["answers"]) or ()], origin=row.origin)


_MAKERS: Mapping[Kind, Callable[[Row, PromptFormat], BenchmarkRow]] = {
    "classification": _make_labelled,
    "token_classification": _make_tagged,
    "qa": _make_question,
}

HEAD_KINDS = tuple(_MAKERS)
"""The forms of rows that a head is asked."""


def read_texts(row: BenchmarkRow) -> tuple[str, ...]:
    """Return the text of a row to classify, or its two.

    Raises:
        DataError: It has none.
    """
    texts = row.facts.get(TEXTS)
    if not isinstance(texts, tuple):
        raise DataError(f"{str(row.prompt)[:60]!r} is a prompt, and a classifier reads a text, or two.")
    return texts


def read_words(row: BenchmarkRow) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the words of a row, and the right label of each.

    Raises:
        DataError: It has none.
    """
    words, tags = row.facts.get(WORDS), row.facts.get(TAGS)
    if not isinstance(words, tuple) or not isinstance(tags, tuple):
        raise DataError(f"{str(row.prompt)[:60]!r} is a prompt, and a token classifier reads words, one by one.")
    return words, tags


def read_question(row: BenchmarkRow) -> Asked:
    """Return the question, context and answers of a row.

    Raises:
        DataError: It has none.
    """
    asked = row.facts.get(ASKED)
    if not isinstance(asked, Mapping):
        raise DataError(f"{str(row.prompt)[:60]!r} is a prompt, and this model reads a question and its context.")
    return cast("Asked", asked)
