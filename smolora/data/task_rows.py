"""What a task learns of its rows: labels, words with labels, answers at their place; and whether values are that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from smolora.data.labels import learn_labels, name_label
from smolora.data.rows import Row
from smolora.errors import count_of

if TYPE_CHECKING:
    from smolora.data.prompts import PromptFormat

_NO_LABEL = ("-1", "-100")
"""What data sets put where an annotator gave no label."""


def find_label_problem(value: object) -> str | None:
    """Return why `value` is no label, or None.

    >>> find_label_problem("-1")
    'it holds -1, which stands for no label: if it is one here, give it another name'
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return "it holds no label"
    name = name_label(value)
    if name in _NO_LABEL:
        return f"it holds {name}, which stands for no label: if it is one here, give it another name"
    if name is None:
        return f"a label is a text or a whole number, found {type(value).__name__} {value!r}"[:200]
    return None


def find_tags_problem(words: object, tags: object) -> str | None:
    """Return why words and their labels can't be learned from, or None."""
    if not isinstance(words, Sequence) or isinstance(words, str) or not all(isinstance(word, str) for word in words):
        return f"the words of a row are a list of texts, found {type(words).__name__} {words!r}"[:200]
    if not isinstance(tags, Sequence) or isinstance(tags, str):
        return f"the labels of a row are a list, found {type(tags).__name__} {tags!r}"[:200]
    if len(words) != len(tags):
        return f"{count_of(len(words), 'word')}, but {count_of(len(tags), 'label')}"
    problems = (problem for tag in tags if (problem := find_label_problem(tag)))
    return next(problems, None)


def find_answer_problem(context: object, answers: object) -> str | None:
    """Return why the answers of a question can't be learned from, or None; none at all is an answer too."""
    found = read_answers(answers)
    if found is None:
        return (
            "answers are {'text': [...], 'answer_start': [...]} as in SQuAD, or a list of {'text', 'answer_start'}, "
            f"found {answers!r}"
        )[:300]
    for text, start in found:
        at_place = str(context)[max(start, 0) : max(start, 0) + len(text)]
        if not text.strip() or start < 0 or at_place != text:
            return f"the answer {text!r} isn't at character {start} of the context, where {at_place!r} is"[:300]
    return None


def read_answers(answers: object) -> list[tuple[str, int]] | None:
    """Return (text, first character) of each answer; None where they aren't in SQuAD's form.

    >>> read_answers({"text": ["a"], "answer_start": [3]}), read_answers([{"text": "a", "answer_start": 3}])
    ([('a', 3)], [('a', 3)])
    """
    if isinstance(answers, Mapping):
        texts, starts = answers.get("text"), answers.get("answer_start")
    elif isinstance(answers, list | tuple) and all(isinstance(answer, Mapping) for answer in answers):
        texts, starts = ([answer.get(name) for answer in answers] for name in ("text", "answer_start"))
    else:
        return None
    if not (isinstance(texts, list | tuple) and isinstance(starts, list | tuple) and len(texts) == len(starts)):
        return None
    if not all(isinstance(text, str) for text in texts) or not all(type(start) is int for start in starts):
        return None
    return list(zip(texts, starts, strict=True))


def learn_form(
    train: Sequence[Row], held_out: Sequence[Row], fmt: PromptFormat, *, known: Sequence[str] = ()
) -> PromptFormat:
    """Return the form with what the rows teach: their labels, or whether a question may have no answer.

    Args:
        train: The rows to learn from.
        held_out: Rows to evaluate on.
        fmt: The rows' form.
        known: The labels of the adapter that is trained further, which stay what they are.

    Raises:
        DataError: As `learn_labels`.
    """
    if fmt.kind == "qa":
        column = fmt.columns["answers"]
        return fmt.model_copy(update={"may_lack_answer": not all(read_answers(row.values[column]) for row in train)})
    if fmt.kind not in ("classification", "token_classification"):
        return fmt
    return fmt.with_labels(learn_labels(train, held_out, fmt, known=known))
