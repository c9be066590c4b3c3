"""SQuAD's file, articles of paragraphs of questions, as one row a question."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from smolora.errors import DataError


def is_squad(document: object) -> bool:
    """Whether a JSON document is of SQuAD's form: its data are articles with paragraphs.

    >>> is_squad({"version": "1.1", "data": [{"title": "A", "paragraphs": []}]}), is_squad([{"text": "A"}])
    (True, False)
    """
    articles = document.get("data") if isinstance(document, Mapping) else None
    return isinstance(articles, list) and all(isinstance(one, Mapping) and "paragraphs" in one for one in articles)


def iter_questions(document: Mapping[str, object]) -> Iterator[dict[str, object]]:
    """Yield id, context, question and answers of every question, in the file's order.

    Raises:
        DataError: A paragraph or a question lacks one of them.
    """
    try:
        articles = cast("Sequence[Mapping[str, Sequence[Mapping[str, object]]]]", document["data"])
        for paragraph in (paragraph for article in articles for paragraph in article["paragraphs"]):
            for question in cast("Sequence[Mapping[str, object]]", paragraph["qas"]):
                yield {
                    "id": question.get("id"),
                    "context": paragraph["context"],
                    "question": question["question"],
                    "answers": question["answers"],
                }
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"not in SQuAD's format: {type(error).__name__} {error}") from error
