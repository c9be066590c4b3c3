"""ROUGE, by rouge-score, which enters by this file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.metadata import version

from smolora.data.benchmark_rows import BenchmarkRow
from smolora.evaluation.metric import Answer, MeanMetric


class RougeMetric(MeanMetric):
    """F of ROUGE-1, -2, -L and -Lsum, 0 to 1: of each row that of its best reference, then the mean."""

    names = ("rouge1", "rouge2", "rougeL", "rougeLsum")

    def __init__(self) -> None:
        handlers = list(logging.root.handlers)
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer

        logging.root.handlers = handlers  # absl, which it imports, has put one there that repeats every line.
        self._scorer = RougeScorer(list(self.names), tokenizer=DefaultTokenizer(use_stemmer=True))
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
