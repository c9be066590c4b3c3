"""Metrics of short answers: exact match, labels, SQuAD's two, how varied answers are, and the loss of references."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from smolora.data.benchmark_rows import BenchmarkRow
from smolora.errors import DataError
from smolora.evaluation.metric import Answer, CorpusMetric, MeanMetric, SummedMetric, Sums

_OURS = "smolora"
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class ExactMatch(MeanMetric):
    """Whether an answer is one of the references, but for case and white space."""

    names = ("exact_match",)
    variants = ("equal to a reference, case- and space-normalised, share of rows",)
    version = _OURS

    def score(self, answer: Answer, row: BenchmarkRow) -> Sequence[float]:
        """Return 1 or 0."""
        return [float(_fold(answer.text) in map(_fold, row.references))]


class SquadMetric(MeanMetric):
    """Exact match and F1 of tokens, by the rules of SQuAD 1.1's official script."""

    names = ("exact_match", "f1")
    variants = (
        "SQuAD 1.1: equal to a reference without case, punctuation and articles, share of rows; empty where none is",
        "SQuAD 1.1: F1 of tokens with the best reference, mean over rows",
    )
    version = "rules of evaluate-v1.1.py"

    def score(self, answer: Answer, row: BenchmarkRow) -> Sequence[float]:
        """Return both of the best reference."""
        found = _normalise_squad(answer.text)
        if "" in row.references:  # The question has no answer.
            return [float(not found)] * 2
        references = [_normalise_squad(reference) for reference in row.references]
        return [float(found in references), max((_token_f1(found, one) for one in references), default=0.0)]


class LabelMetric(SummedMetric):
    """Accuracy and macro F1 of labels, read from what was written or chosen by likelihood."""

    names = ("accuracy", "f1")
    version = _OURS

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)
        self.variants = (
            "share of right labels: the likeliest one is the answer, or of a written answer the first one named",
            f"macro F1 over {len(labels)} labels, without those that neither rows nor answers have",
        )

    @property
    def width(self) -> int:
        """Right, answered and given counts of each label, and the rows."""
        return 3 * len(self.labels) + 1

    def measure(self, answer: Answer, row: BenchmarkRow) -> Sums:
        """Return the counts of one row.

        Raises:
            DataError: Its reference is no label.
        """
        return self.count([(answer.label or read_label(answer.text, self.labels), row.references[0])])

    def count(self, pairs: Iterable[tuple[str | None, str]]) -> Sums:
        """Return the counts of labels that were found, or None, each with the right one.

        Raises:
            DataError: One of them is no label.
        """
        hits, answered, given, num_pairs = *np.zeros((3, len(self.labels))), 0
        for found, right in pairs:
            place = self._find(right)
            given[place] += 1
            if found is not None:
                answered[self._find(found)] += 1
                hits[place] += found == right
            num_pairs += 1
        return np.concatenate([hits, answered, given, [float(num_pairs)]])

    def _find(self, label: str) -> int:
        if label not in self.labels:
            raise DataError(f"{label!r} is no label. Labels: {', '.join(self.labels) or 'none'}.")
        return self.labels.index(label)

    def conclude(self, sums: Sums) -> Sequence[float]:
        """Return accuracy and macro F1."""
        hits, answered, given = sums[:-1].reshape(3, -1)
        is_there = answered + given > 0
        scores = 2 * hits[is_there] / (answered + given)[is_there]
        return [float(hits.sum() / sums[-1]), float(scores.mean()) if len(scores) else 0.0]


class DistinctMetric(CorpusMetric):
    """Different n-grams by all n-grams of the answers; memory grows with the different ones."""

    names = ("distinct1", "distinct2")
    variants = tuple(f"different by all {n}-grams of all answers, lowercase, split at white space" for n in (1, 2))
    version = _OURS

    def __init__(self) -> None:
        self._counts: tuple[set[tuple[str, ...]], set[tuple[str, ...]]] = (set(), set())
        self._totals = [0, 0]

    def add(self, answer: Answer, row: BenchmarkRow) -> None:
        """Take in one answer."""
        tokens = answer.text.lower().split()
        for index, seen in enumerate(self._counts):
            ngrams = list(zip(*(tokens[start:] for start in range(index + 1)), strict=False))
            seen.update(ngrams)
            self._totals[index] += len(ngrams)

    def conclude(self) -> Sequence[float]:
        """Return the shares; 0 where there is no n-gram."""
        return [len(seen) / max(1, total) for seen, total in zip(self._counts, self._totals, strict=True)]


class LossMetric(SummedMetric):
    """Mean -log p of the references' tokens under the model, and its exponential."""

    names: tuple[str, ...] = ("loss", "perplexity")
    variants: tuple[str, ...] = (
        "nats per token of the references and their end, given the prompt",
        "exp(loss), by token",
    )
    version = _OURS
    most = math.inf

    @property
    def width(self) -> int:
        """Losses and tokens."""
        return 2

    def measure(self, answer: Answer, row: BenchmarkRow) -> Sums:
        """Return the sum and the tokens of one row."""
        return np.array([answer.loss_sum or 0.0, float(answer.num_tokens)])

    def conclude(self, sums: Sums) -> Sequence[float]:
        """Return both; not a number where there were no tokens."""
        if not sums[1]:
            return [math.nan, math.nan]
        loss = float(sums[0] / sums[1])
        return [loss, math.exp(min(loss, 700.0))]  # Beyond, a float64 overflows.


class MajorityMetric(SummedMetric):
    """What a classifier must beat: the accuracy of one that always gives the commonest label of these very rows."""

    names = ("majority_accuracy",)
    variants = ("share of right labels, were the commonest label of these rows always the answer",)
    version = _OURS

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)

    @property
    def width(self) -> int:
        """Rows of each label."""
        return len(self.labels)

    def measure(self, answer: Answer, row: BenchmarkRow) -> Sums:
        """Return a 1 for the label of the row."""
        return np.array([float(label == row.references[0]) for label in self.labels])

    def conclude(self, sums: Sums) -> Sequence[float]:
        """Return the share of the commonest."""
        return [float(sums.max() / sums.sum())] if sums.any() else [math.nan]


class HeadLossMetric(LossMetric):
    """Mean -log p of what is right under the head of a task."""

    names = ("loss",)
    variants = ("nats per right label (of an answer in a context: per end of it), under the head",)

    def conclude(self, sums: Sums) -> Sequence[float]:
        """Return the loss; not a number where there were no labels."""
        return super().conclude(sums)[:1]


def read_label(text: str, labels: Sequence[str]) -> str | None:
    """Return the label that is named first in `text`, without regard to case; None where none is.

    >>> read_label(" Not entailment: neutral", ("entailment", "neutral"))
    'entailment'
    """
    places = ((re.search(rf"(?<!\w){re.escape(label)}(?!\w)", text, re.I), label) for label in labels)
    found = [(place.start(), -len(label), label) for place, label in places if place]
    return min(found)[2] if found else None


def _fold(text: str) -> str:
    return " ".join(text.casefold().split())


def _normalise_squad(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _token_f1(found: str, reference: str) -> float:
    ours, theirs = found.split(), reference.split()
    num_same = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * num_same / (len(ours) + len(theirs)) if num_same else 0.0
