"""BLEU, by sacrebleu (which enters by this file), and NIST by the rules of mteval on the same tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.metadata import version

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from smolora.data.benchmark_rows import BenchmarkRow
from smolora.evaluation.metric import Answer, CorpusMetric, SummedMetric, Sums

_ORDERS = (1, 2, 3, 4)
_LONGEST = 5
_BETA = -math.log(0.5) / math.log(1.5) ** 2
"""NIST's length penalty is 0.5 where the answers have two thirds of the references' length."""

Ngram = tuple[str, ...]


class BleuMetric(SummedMetric):
    """Corpus BLEU of up to 1, 2, 3 and 4 tokens, 0 to 100; `bleu` is that of 4."""

    names = ("bleu1", "bleu2", "bleu3", "bleu")
    most = 100.0

    def __init__(self, *, lowercase: bool = False) -> None:
        self._bleu = _open_bleu(lowercase=lowercase)
        self.version = f"sacrebleu {version('sacrebleu')}"
        case = "lc" if lowercase else "mixed"
        self.variants = tuple(f"corpus BLEU-{order}, 13a tokens, case {case}, smoothing exp" for order in _ORDERS)

    @property
    def width(self) -> int:
        """Matches and n-grams of each order, and the lengths of answer and reference."""
        return 2 * len(_ORDERS) + 2

    def measure(self, answer: Answer, row: BenchmarkRow) -> Sums:
        """Return the counts that corpus BLEU adds up."""
        found = self._bleu.corpus_score([answer.text], [[reference] for reference in row.references])
        return np.array([*found.counts, *found.totals, found.sys_len, found.ref_len], dtype=np.float64)

    def conclude(self, sums: Sums) -> Sequence[float]:
        """Return sacrebleu's score of the sums."""
        counts = [round(value) for value in sums]
        correct, total, (answered, given) = counts[:4], counts[4:8], counts[8:]
        return [
            BLEU.compute_bleu(correct[:n], total[:n], answered, given, smooth_method="exp", max_ngram_order=n).score
            for n in _ORDERS
        ]


@cache
def _open_bleu(*, lowercase: bool) -> BLEU:
    """Return one for all: it remembers the tokens of references, which base and tuned model share."""
    return BLEU(lowercase=lowercase)


class NistMetric(CorpusMetric):
    """NIST-5: matches weighted by how much they tell, as the references' own counts say.

    The weights come from all references, so there is no interval, and memory grows with their different n-grams.
    """

    names = ("nist",)
    variants = ("NIST-5 of mteval-v13a (arithmetic mean of information, lowercase), 13a tokens",)
    version = "rules of mteval-v13a, as in the E2E metrics"

    def __init__(self) -> None:
        self._tokenize: Callable[[str], str] = Tokenizer13a()  # type: ignore[no-untyped-call]
        self._references: Counter[Ngram] = Counter()
        self._hits: Counter[Ngram] = Counter()
        self._num_ngrams = [0] * _LONGEST
        self._num_rows = self._num_references = 0

    def add(self, answer: Answer, row: BenchmarkRow) -> None:
        """Count the n-grams of an answer and of its references."""
        references = [self._tokenize(reference.lower()).split() for reference in row.references]
        found = self._tokenize(answer.text.lower()).split()
        most: Counter[Ngram] = Counter()
        for reference in references:
            counted = Counter(_iter_ngrams(reference))
            self._references.update(counted)
            self._references[()] += len(reference)
            most |= counted
        self._hits.update(Counter(_iter_ngrams(found)) & most)
        for order in range(_LONGEST):
            self._num_ngrams[order] += max(0, len(found) - order)
        self._num_rows += 1
        self._num_references += len(references)

    def conclude(self) -> Sequence[float]:
        """Return the score."""
        gained = [0.0] * _LONGEST
        for ngram, count in self._hits.items():
            gained[len(ngram) - 1] += count * math.log2(self._references[ngram[:-1]] / self._references[ngram])
        total = sum(gain / number for gain, number in zip(gained, self._num_ngrams, strict=True) if number)
        mean_length = self._references[()] / max(1, self._num_references)
        ratio = self._num_ngrams[0] / (mean_length * self._num_rows) if mean_length else 0.0
        penalty = 0.0 if ratio == 0 else math.exp(-_BETA * math.log(min(ratio, 1.0)) ** 2)
        return [penalty * total]


def _iter_ngrams(tokens: Sequence[str]) -> Iterable[Ngram]:
    return (
        tuple(tokens[start : start + order])
        for order in range(1, _LONGEST + 1)
        for start in range(len(tokens) - order + 1)
    )
