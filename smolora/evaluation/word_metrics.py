"""Metrics of labels of words: of each word, and of the entities that labels in the form of BIO mark."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from smolora.data.benchmark_rows import BenchmarkRow
from smolora.errors import DataError
from smolora.evaluation.answers import LabelMetric, MajorityMetric
from smolora.evaluation.head_rows import read_words
from smolora.evaluation.metric import Answer, SummedMetric, Sums

Entity = tuple[int, int, str]
"""The first word, the one behind the last, and the type."""

_MARKED = re.compile(r"[BIES]-.+")


class WordMetric(LabelMetric):
    """Accuracy and macro F1 over words."""

    def __init__(self, labels: Sequence[str]) -> None:
        super().__init__(labels)
        self.variants = (
            "share of words with the right label",
            f"macro F1 of words over {len(labels)} labels, without those that neither rows nor answers have",
        )

    def measure(self, answer: Answer, row: BenchmarkRow) -> Sums:
        """Return the counts of one row's words.

        Raises:
            DataError: One of its labels is none of the head's, or the answer is to another number of words.
        """
        words, right = read_words(row)
        if len(answer.labels) != len(words):
            raise DataError(
                f"an answer in predictions.jsonl has {len(answer.labels)} labels for the {len(words)} words of its "
                "row: the file was changed. Remove it, and every row is asked again."
            )
        return self.count(zip((label or None for label in answer.labels), right, strict=True))


class WordMajorityMetric(MajorityMetric):
    """The accuracy of always giving the commonest label of these very words."""

    variants = ("share of words with the right label, were the commonest label of these rows always the answer",)

    def measure(self, answer: Answer, row: BenchmarkRow) -> Sums:
        """Return how many words have each label."""
        _, right = read_words(row)
        return np.array([float(right.count(label)) for label in self.labels])


class EntityMetric(SummedMetric):
    """Precision, recall and F1 of whole entities, counted over all rows: right are those with both ends and the type.

    The rules are those of conlleval (Tjong Kim Sang and De Meulder 2003), as seqeval has them: an I without a B before
    it begins an entity too. As there, a share of nothing is 0.
    """

    names = ("entity_precision", "entity_recall", "entity_f1")
    variants = tuple(
        f"{what} of entities with both ends and their type right, over all rows"
        for what in ("precision", "recall", "F1")
    )
    version = "rules of seqeval"

    @property
    def width(self) -> int:
        """Right, answered and given entities."""
        return 3

    def measure(self, answer: Answer, row: BenchmarkRow) -> Sums:
        """Return the counts of one row."""
        found, right = set(iter_entities(answer.labels)), set(iter_entities(read_words(row)[1]))
        return np.array([len(found & right), len(found), len(right)], np.float64)

    def conclude(self, sums: Sums) -> Sequence[float]:
        """Return the three."""
        hits, found, right = sums.tolist()
        return [hits / (found or 1.0), hits / (right or 1.0), 2 * hits / ((found + right) or 1.0)]


def is_entity_scheme(labels: Sequence[str]) -> bool:
    """Whether labels mark entities: O, and B- or I- (or E- and S-) with a type.

    >>> is_entity_scheme(["O", "B-PER", "I-PER"]), is_entity_scheme(["O", "NOUN"]), is_entity_scheme(["0", "1"])
    (True, False, False)
    """
    marked = [label for label in labels if label != "O"]
    return bool(marked) and all(_MARKED.fullmatch(label) for label in marked)


def iter_entities(labels: Sequence[str]) -> Iterator[Entity]:
    """Yield the entities that the labels of words mark; an empty label marks none, as O.

    >>> list(iter_entities(["B-PER", "I-PER", "B-PER", "O", "I-LOC", "I-ORG"]))
    [(0, 2, 'PER'), (2, 3, 'PER'), (4, 5, 'LOC'), (5, 6, 'ORG')]
    """
    start, before = 0, ("O", "")
    for place, label in enumerate([*labels, "O"]):
        prefix, _, kind = label.partition("-")
        is_marked = bool(kind)
        begins = is_marked and (prefix in "BS" or before[0] in "OES" or before[1] != kind)
        if before[1] and (begins or not is_marked):
            yield start, place, before[1]
        if begins:
            start = place
        before = (prefix, kind) if is_marked else ("O", "")
