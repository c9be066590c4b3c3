"""ROUGE, by rouge-score, which enters by this file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.metadata import version

from nltk.stem.porter import PorterStemmer

from smolora.data.benchmark_rows import BenchmarkRow
from smolora.evaluation.metric import Answer, MeanMetric


class _Tokenizer:
    """rouge-score's own tokens, with stems that are remembered: without that, stemming takes two thirds of the time."""

    def __init__(self, split: Callable[[str, _Tokenizer], list[str]]) -> None:
        self._split = split
        self.stem = lru_cache(maxsize=1 << 16)(PorterStemmer().stem)

    def tokenize(self, text: str) -> list[str]:
        """Return the stems of a text's words."""
        return self._split(text, self)


class RougeMetric(MeanMetric):
    """F of ROUGE-1, -2, -L and -Lsum, 0 to 1: of each row that of its best reference, then the mean."""

    names = ("rouge1", "rouge2", "rougeL", "rougeLsum")

    def __init__(self) -> None:
        handlers = list(logging.root.handlers)
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenize import tokenize

        logging.root.handlers = handlers  # absl, which it imports, has put one there that repeats every line.
        self._scorer = RougeScorer(list(self.names), tokenizer=_Tokenizer(tokenize))
        self.version = f"rouge-score {version('rouge-score')}"
        self.variants = tuple(
            f"{name}, F1 with Porter stemmer, tokens of a-z and 0-9 alone, best reference, mean over rows"
            + (", sentences by line" if name == "rougeLsum" else "")
            for name in self.names
        )

    def score(self, answer: Answer, row: BenchmarkRow) -> Sequence[float]:
        """Return the F of the best reference for each name."""
        scores = self._scorer.score_multi(row.references, answer.text)
        return [scores[name].fmeasure for name in self.names]
