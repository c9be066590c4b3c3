"""Which columns a task reads: recognised by their usual names, or named by a person; case doesn't matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from smolora.config.data import DataConfig
from smolora.config.model import TaskType
from smolora.data.rows import find_column, match_column
from smolora.errors import ConfigError, DataError

TaskKind = Literal["classification", "token_classification", "qa"]

FORMS_BY_TASK: Mapping[TaskType, TaskKind] = {
    "classification": "classification",
    "token_classification": "token_classification",
    "qa": "qa",
}
"""Tasks whose rows have a form of their own; the others learn an answer to a prompt, or a text."""

_TEXTS: tuple[tuple[str, ...], ...] = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("text", "text_pair"),
    ("text",),
    ("sentence",),
    ("prompt",),
)
_LABELS = ("label", "gold_label", "labels", "completion")
_WORDS = ("tokens", "words")
_TAGS = ("tags", "ner_tags", "labels")
_ASKED = ("context", "question", "answers")
_FIELDS = ("text_field", "text_pair_field", "label_field", "prompt_field", "completion_field")
_FLAGS = {name: f"--{name.replace('_', '-')}" for name in _FIELDS}

USUAL_NAMES: Mapping[str, frozenset[str]] = {
    "classification": frozenset([*(name for names in _TEXTS for name in names), *_LABELS]),
    "token_classification": frozenset([*_WORDS, *_TAGS]),
    "qa": frozenset(_ASKED),
}
"""By task: the names by which a column of its rows is recognised."""


def resolve_task_columns(columns: Sequence[str], data: DataConfig, task: TaskType) -> tuple[TaskKind, dict[str, str]]:
    """Return the form of a task's rows, and the column of each of its roles.

    Raises:
        DataError: A named column is missing, or none of the usual ones is there.
        ConfigError: A field is named that the task has no use for, or texts with places in them are to be cleaned.
    """
    kind = FORMS_BY_TASK[task]
    if data.clean and kind != "classification":
        raise ConfigError(
            f"data.clean is set, and rows of {task} say where in a text something is, or what each word is: a cleaned "
            "text has other places. Clean the rows before you label them."
        )
    if kind == "qa":
        refuse_other_fields(data, task, *_FIELDS)
        return kind, {role: _find(None, (role,), columns, task, role) for role in _ASKED}
    refuse_other_fields(data, task, "prompt_field", "completion_field")
    if kind == "token_classification":
        refuse_other_fields(data, task, "text_pair_field")
        words = _find(data.text_field, _WORDS, columns, task, "words")
        return kind, {"tokens": words, "tags": _find(data.label_field, _TAGS, columns, task, "labels")}
    return kind, {**_find_texts(columns, data), "label": _find(data.label_field, _LABELS, columns, task, "labels")}


def refuse_other_fields(data: DataConfig, task: TaskType, *names: str) -> None:
    """Raise where a field is named that rows of `task` don't have.

    Raises:
        ConfigError: So it is.
    """
    values = data.model_dump(include=set(names))
    if named := next((name for name in names if values[name] is not None), None):
        raise ConfigError(
            f"data.{named} ({_FLAGS[named]}) is set, and {task} has no such column. Leave it out, or choose another "
            "--task (model.task_type)."
        )


def _find_texts(columns: Sequence[str], data: DataConfig) -> dict[str, str]:
    if data.text_pair_field is not None and data.text_field is None:
        raise ConfigError("data.text_pair_field is set without data.text_field: name the first text too.")
    if data.text_field is not None:
        pair = data.text_pair_field
        second = {} if pair is None else {"text_pair": find_column(pair, columns)}
        return {"text": find_column(data.text_field, columns), **second}
    for names in _TEXTS:
        found = [column for name in names if (column := match_column(name, columns)) is not None]
        if len(found) == len(names):
            return dict(zip(("text", "text_pair"), found, strict=False))
    raise DataError(
        f"no column of texts to classify among {_list(columns)}. Known: {'; '.join(' and '.join(t) for t in _TEXTS)}. "
        "Name yours: --text-field X, and --text-pair-field Z for a second text."
    )


def _find(named: str | None, usual: Sequence[str], columns: Sequence[str], task: TaskType, what: str) -> str:
    if named is not None:
        return find_column(named, columns)
    found = next((column for name in usual if (column := match_column(name, columns)) is not None), None)
    if found is None:
        flag = {"words": "--text-field X", "labels": "--label-field Y"}.get(what)
        raise DataError(
            f"{task} needs a column {' or '.join(map(repr, usual))}, found {_list(columns)}. "
            + (f"Name yours: {flag}." if flag else "Rows are as in SQuAD: context, question, answers.")
        )
    return found


def _list(columns: Sequence[str]) -> str:
    return ", ".join(map(repr, columns)) or "(none)"
