"""What a task's head is asked: rows as it was trained on them, with the right answers in its own labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from smolora.config.model import TaskType
from smolora.data.benchmark_rows import ASKED, TEXTS, WORDS, BenchmarkRow
from smolora.data.labels import match_label, refuse_unknown
from smolora.data.spans import SpanAnswer
from smolora.data.task_rows import find_answer_problem
from smolora.errors import ConfigError, DataError
from smolora.evaluation.head_rows import read_question, read_texts, read_words, tag_words
from smolora.evaluation.heads import choose_head_metrics
from smolora.evaluation.label_asker import LabelAsker
from smolora.evaluation.row_source import RowSource
from smolora.evaluation.span_asker import SpanAsker
from smolora.evaluation.word_asker import WordAsker
from smolora.generation.sampling import SamplingSettings
from smolora.models.bundle import ModelBundle
from smolora.models.tasks import ASKED_BY, TASK_NAMES, describe_head

_READS: dict[TaskType, tuple[str, str]] = {
    "classification": (TEXTS, "labels"),
    "token_classification": (WORDS, "words with a label each"),
    "qa": (ASKED, "questions about contexts"),
}
"""The fact of a row that each head reads, and what rows without it lack."""


def refuse_drawing(bundle: ModelBundle, settings: SamplingSettings | None, *, by_likelihood: bool) -> None:
    """Raise where something is set that shapes written answers: a head writes none.

    Raises:
        ConfigError: So it is.
    """
    names = sorted(settings.model_fields_set if settings else ()) + ["by_likelihood"] * by_likelihood
    if names:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        raise ConfigError(f"{flags} would change nothing: {describe_head(bundle.task, bundle.labels)}. Leave it out.")


def fit_to_head(source: RowSource, bundle: ModelBundle) -> RowSource:
    """Return rows that the head of a task can be asked, with its metrics.

    The labels of rows are the head's but for case. A head that has numbers alone answers a benchmark by the numbers of
    its classes, and a model that wasn't tuned here takes the numbers of its outputs.

    Raises:
        ConfigError: The rows have nothing for this head, or other texts than the model was trained on.
        DataError: Rows have labels that the head doesn't know, which are named with their counts; or an answer isn't
            at its place.
    """
    fact, what = _READS[bundle.task]
    first = next(source.iter_rows(), None)
    is_named = bundle.task == "classification" and bool(source.resources.labels)
    if first is not None and fact not in first.facts and not is_named:
        raise ConfigError(
            f"{source.name} has no {what}, and {describe_head(bundle.task, bundle.labels)}. Name rows that have some "
            "with --data."
        )
    fit = {"classification": _fit_texts, "token_classification": _fit_words, "qa": _fit_questions}[bundle.task]
    return replace(fit(source, bundle), metrics=choose_head_metrics(bundle))


def _fit_texts(source: RowSource, bundle: ModelBundle) -> RowSource:
    named = source.resources.labels
    aliases = _find_aliases(source, bundle)
    asked_as_prompt = _is_asked_as_prompt(bundle)

    def fit(row: BenchmarkRow) -> BenchmarkRow:
        label = match_label(row.references[0], bundle.labels, aliases) or row.references[0]
        texts = (str(row.prompt),) if asked_as_prompt and named else read_texts(row)
        return BenchmarkRow(row.prompt, (label,), {TEXTS: texts})

    def iter_rows() -> Iterator[BenchmarkRow]:
        return map(fit, source.iter_rows())

    first = next(iter_rows(), None)
    if first is not None:
        refuse_other_texts(bundle, found=len(read_texts(first)), where=source.name)
    refuse_unknown(source.name, (set(row.references) for row in iter_rows()), bundle.labels, source.label_names)
    return replace(source, iter_rows=iter_rows, resources=replace(source.resources, labels=bundle.labels))


def _fit_words(source: RowSource, bundle: ModelBundle) -> RowSource:
    aliases = _find_aliases(source, bundle)

    def fit(row: BenchmarkRow) -> BenchmarkRow:
        words, tags = read_words(row)
        return tag_words(
            words, tuple(match_label(tag, bundle.labels, aliases) or tag for tag in tags), origin=row.origin
        )

    def iter_rows() -> Iterator[BenchmarkRow]:
        return map(fit, source.iter_rows())

    refuse_unknown(source.name, (set(read_words(row)[1]) for row in iter_rows()), bundle.labels, source.label_names)
    return replace(source, iter_rows=iter_rows, resources=replace(source.resources, labels=bundle.labels))


def _fit_questions(source: RowSource, bundle: ModelBundle) -> RowSource:
    def check(row: BenchmarkRow) -> BenchmarkRow:
        asked = read_question(row)
        if problem := find_answer_problem(asked["context"], asked["answers"]):
            raise DataError(f"{row.origin or source.name}: {problem}.")
        return row

    return replace(source, iter_rows=lambda: map(check, source.iter_rows()))


def require_head(bundle: ModelBundle, task: TaskType) -> None:
    """Raise where a model has another head than that of `task`, or none.

    Raises:
        ConfigError: So it has.
    """
    if bundle.task != task:
        raise ConfigError(
            f"this model is a {TASK_NAMES[bundle.task]}, and this is for a {TASK_NAMES[task]}: ask it with "
            f"InferencePipeline.{ASKED_BY[bundle.task]}."
        )


def _find_aliases(source: RowSource, bundle: ModelBundle) -> dict[str, str]:
    """Return which label of the head other names of rows stand for."""
    numbers = _name_numbers(source.resources.labels, bundle)
    found = {name: match_label(f"{i}", bundle.labels, numbers) for i, name in enumerate(source.label_names)}
    return numbers | {name: label for name, label in found.items() if label is not None}


def _name_numbers(named: Sequence[str], bundle: ModelBundle) -> dict[str, str]:
    """Return which label of the head another name stands for.

    Labels that were learned here are in an order of ours, so the numbers of a person's rows don't say which is meant.
    """
    if named:
        names = {alias: name for i, name in enumerate(named) for alias in (f"{i}", f"LABEL_{i}")}
        return {names[label]: label for label in bundle.labels if label in names}
    if bundle.prompt_format is None:
        return {str(number): label for number, label in enumerate(bundle.labels)}
    return {}


def _is_asked_as_prompt(bundle: ModelBundle) -> bool:
    """Whether the model was trained on a benchmark's prompts, as `--dataset` gives them."""
    fmt = bundle.prompt_format
    return fmt is not None and fmt.columns.get("text") == "prompt"


def classify_texts(
    bundle: ModelBundle,
    texts: Sequence[object],
    labels: Sequence[str],
    pairs: Sequence[str] | None,
    *,
    batch_size: int,
) -> npt.NDArray[np.float64]:
    """Return log p of every label of a classifier for texts, or pairs of them, [N, C].

    Raises:
        ConfigError: The model is no text classifier, has other labels, or was trained on another number of texts; or
            there are not as many second texts.
    """
    require_head(bundle, "classification")
    if labels and set(labels) != set(bundle.labels):
        raise ConfigError(f"this classifier's labels are {', '.join(bundle.labels)}: leave labels out.")
    if pairs is not None and len(pairs) != len(texts):
        raise ConfigError(f"{len(texts)} texts and {len(pairs)} second texts: give as many.")
    refuse_other_texts(bundle, found=1 if pairs is None else 2, where="what is asked")
    if not all(isinstance(text, str) for text in texts):
        raise ConfigError("a classifier reads texts, not conversations.")
    first = [str(text) for text in texts]
    rows = [(text,) for text in first] if pairs is None else list(zip(first, pairs, strict=True))
    return LabelAsker(bundle, batch_size=batch_size).measure(rows)


def label_words(
    bundle: ModelBundle, rows: Sequence[Sequence[str]], *, batch_size: int
) -> list[npt.NDArray[np.float64]]:
    """Return log p of every label of a token classifier for every word of rows, [words, C].

    Raises:
        ConfigError: The model is no token classifier, or a row is a text in place of its words.
        DataError: A word has no token of its own in the model's context.
    """
    require_head(bundle, "token_classification")
    if any(isinstance(words, str) for words in rows):
        raise ConfigError("a token classifier reads lists of words, found a text: split it into words.")
    if not all(isinstance(words, Sequence) and all(isinstance(word, str) for word in words) for words in rows):
        raise ConfigError("a token classifier reads lists of words, each a text.")
    found = WordAsker(bundle, batch_size=batch_size).measure(rows)
    for number, (words, measured) in enumerate(zip(rows, found, strict=True), start=1):
        lost = [word for word, line in zip(words, measured, strict=True) if np.isnan(line).any()]
        if lost:
            raise DataError(
                f"row {number:,}: {len(lost)} of {len(words)} words have no token of their own within the model's "
                f"context of {bundle.context} tokens, {lost[0]!r} first. Leave them out, or split the row."
            )
    return found


def find_answers(
    bundle: ModelBundle, questions: Sequence[str], contexts: Sequence[str], *, batch_size: int
) -> list[tuple[str, SpanAnswer]]:
    """Return what is said to each question, and the best answer in its context.

    Raises:
        ConfigError: The model isn't one for question answering, or what is given are no texts.
        DataError: A question leaves no room for its context.
    """
    require_head(bundle, "qa")
    if not all(isinstance(text, str) for text in (*questions, *contexts)):
        raise ConfigError("a model for question answering reads texts: give every question and context as one.")
    pairs = zip(questions, contexts, strict=True)
    asked = [{"question": question, "context": context} for question, context in pairs]
    asker = SpanAsker(bundle, batch_size=batch_size)
    return [(asker.say(found), found) for found in asker.find(asked)]


def refuse_other_texts(bundle: ModelBundle, *, found: int, where: str) -> None:
    """Raise where a classifier was trained on another number of texts a row.

    Raises:
        ConfigError: So it was.
    """
    trained = bundle.prompt_format
    if trained is None or trained.kind != "classification":
        return
    wanted = 2 if "text_pair" in trained.columns else 1
    if found != wanted:
        raise ConfigError(
            f"the model was trained on {wanted} text{'s' * (wanted > 1)} a row, and {where} has {found}: its answers "
            f"would be to something else. Give {'both' if wanted > 1 else 'one'} (--text-field, --text-pair-field; "
            "text_pairs in Python)."
        )
