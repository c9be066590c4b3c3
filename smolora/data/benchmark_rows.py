"""Benchmark files to rows: a prompt, its references, and what else a metric needs. One reader for each kind of file.

A row that can't be read ends the evaluation: a score over other rows than the benchmark's is no score of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import cast

from smolora.data.chat import Message
from smolora.data.readers import infer_type, iter_rows, open_text
from smolora.data.rows import Reject
from smolora.data.squad import iter_questions
from smolora.errors import DataError

Prompt = str | Sequence[Message]

Reader = Callable[[Path, str], Iterator["BenchmarkRow"]]
"""Reads the rows of a split (its name) from a file."""

NLI_LABELS = ("entailment", "neutral", "contradiction")
SENTIMENTS = ("negative", "positive")
TEXTS = "texts"
"""The fact of a row that is the text to classify alone, or two of them."""

WORDS, TAGS = "words", "tags"
"""The facts of a row that are its words, and the right label of each."""

ASKED = "asked"
"""The fact of a row that is a question with its context and its answers, each at its place."""

GOES_ON = "goes_on"
"""The fact of a row that is a piece of a text and not its last one, so that no end follows it."""

NEWS_TOPICS = ("World", "Sports", "Business", "Sci/Tech")


@dataclass(frozen=True, slots=True)
class BenchmarkRow:
    """What a model is asked, and what answers are right."""

    prompt: Prompt
    """A text, or the messages so far."""
    references: tuple[str, ...]
    facts: Mapping[str, object] = field(default_factory=dict)
    """What a metric needs beside the references, by name."""
    origin: str = field(default="", compare=False)
    """Where the row came from, for people; empty where that isn't known."""


def read_e2e(path: Path, split: str) -> Iterator[BenchmarkRow]:
    """Read meaning representations; rows that follow each other with the same one are its references."""
    pairs = ((get_text(values, "mr"), get_text(values, "ref")) for values in iter_values(path))
    return group_references(pairs)


def read_samsum(path: Path, split: str) -> Iterator[BenchmarkRow]:
    """Read dialogues and their summaries."""
    for values in iter_values(path):
        yield BenchmarkRow(get_text(values, "dialogue"), (get_text(values, "summary"),))


def read_nli(path: Path, split: str) -> Iterator[BenchmarkRow]:
    """Read premise, hypothesis and label; rows on whose label the annotators disagreed (-, -1) are left out."""
    for values in iter_values(path):
        label = values.get("label", values.get("gold_label"))
        if label in ("-", -1, "-1"):
            continue
        premise, hypothesis = get_text(values, "premise", "sentence1"), get_text(values, "hypothesis", "sentence2")
        prompt = f"Premise: {premise}\nHypothesis: {hypothesis}\nRelation:"
        yield BenchmarkRow(prompt, (_name_label(label, NLI_LABELS, path),), {TEXTS: (premise, hypothesis)})


def read_sst2(path: Path, split: str) -> Iterator[BenchmarkRow]:
    """Read a sentence of a film review, and whether it is positive."""
    for values in iter_values(path):
        label = _name_label(values.get("label"), SENTIMENTS, path)
        sentence = get_text(values, "text", "sentence")
        yield BenchmarkRow(f"Review: {sentence}\nSentiment:", (label,), {TEXTS: (sentence,)})


def read_ag_news(path: Path, split: str) -> Iterator[BenchmarkRow]:
    """Read title and description of a piece of news, and its topic."""
    for values in iter_values(path):
        news = f"{get_text(values, 'title')}\n{get_text(values, 'description')}"
        label = _name_label(values.get("label"), NEWS_TOPICS, path)
        yield BenchmarkRow(f"News: {news}\nTopic:", (label,), {TEXTS: (news,)})


def read_squad(path: Path, split: str) -> Iterator[BenchmarkRow]:
    """Read questions about paragraphs in SQuAD's format, in the file's order; the answers given are the references.

    The reference of a question without an answer, as SQuAD 2 has them, is empty.
    """
    with open_text(path) as file:
        try:
            for values in iter_questions(json.load(file)):
                answers = cast("Sequence[Mapping[str, str]]", values["answers"])
                yield ask_about(values, [answer["text"] for answer in answers])
        except DataError as error:
            raise DataError(f"{path}: {error}.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not in SQuAD's format: {type(error).__name__} {error}.") from error


def render_question(question: object, context: object) -> str:
    """Return a question about a context as a model that writes is asked it."""
    return f"Context: {context}\nQuestion: {question}\nAnswer:"


def ask_about(asked: Mapping[str, object], answers: Sequence[str], *, origin: str = "") -> BenchmarkRow:
    """Return the row of a question about a context: each different answer is a reference, and nothing where none is.

    Args:
        asked: Its question and context, and what else there is.
        answers: The texts of its answers.
        origin: Where it came from.
    """
    prompt = render_question(asked["question"], asked["context"])
    return BenchmarkRow(prompt, tuple(dict.fromkeys(answers)) or ("",), {ASKED: asked}, origin)


def group_references(pairs: Iterable[tuple[str, str]]) -> Iterator[BenchmarkRow]:
    """Make one row of pairs that follow each other with the same prompt.

    >>> list(group_references([("a", "1"), ("a", "2"), ("b", "3")]))[0].references
    ('1', '2')
    """
    for prompt, group in groupby(pairs, key=lambda pair: pair[0]):
        yield BenchmarkRow(prompt, tuple(reference for _, reference in group))


def iter_values(path: Path) -> Iterator[dict[str, object]]:
    """Yield the rows of a csv or json file with their columns in lower case.

    Raises:
        DataError: The type is unknown, or a row can't be read.
    """
    file_type = infer_type(path)
    if file_type is None:
        raise DataError(f"can't tell the type of {path} from its name.")
    for record in iter_rows(path, file_type):
        if isinstance(record, Reject):
            raise DataError(f"{record.file}:{record.line}: {record.reason}. A benchmark needs every row.")
        if record.values:
            yield {name.casefold(): value for name, value in record.values.items()}


def get_text(values: Mapping[str, object], *names: str) -> str:
    """Return the text in the first of the columns `names` that is there.

    Raises:
        DataError: None is, or it holds no text.
    """
    found = next((values[name] for name in names if name in values), None)
    if not isinstance(found, str):
        raise DataError(f"no text in a column {' or '.join(map(repr, names))}. Columns found: {', '.join(values)}.")
    return found


def _name_label(value: object, labels: Sequence[str], path: Path) -> str:
    """Return the label of a class number, or a label as it is."""
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if isinstance(number, int) and 0 <= number < len(labels):
        return labels[number]
    return _check_label(value, labels, path)


def _check_label(value: object, labels: Sequence[str], path: Path) -> str:
    if value not in labels:
        raise DataError(f"{path}: the label {value!r} is none of {', '.join(labels)}.")
    return str(value)
