"""METEOR by nltk, which enters by this file. It is not METEOR 1.5: other rules, other numbers."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from nltk import data as nltk_data
from nltk.corpus import wordnet
from nltk.tokenize import NLTKWordTokenizer
from nltk.translate.meteor_score import meteor_score

from smolora.data.benchmark_rows import BenchmarkRow
from smolora.evaluation.metric import Answer, MeanMetric, MissingResource

_PLACES = ("corpora/wordnet", "corpora/wordnet.zip")
"""Where nltk reads WordNet from; its downloader leaves the zip alone."""


class MeteorMetric(MeanMetric):
    """nltk's METEOR of each row's best reference, and the mean."""

    names = ("meteor",)
    variants = ("nltk's METEOR (not METEOR 1.5), nltk's Treebank tokens, lowercase, best reference, mean over rows",)

    def __init__(self) -> None:
        """Find WordNet.

        Raises:
            MissingResource: It isn't there.
        """
        if not any(map(_is_there, _PLACES)):
            raise MissingResource(
                "WordNet isn't there. Run `python -m nltk.downloader wordnet`, or set NLTK_DATA to a folder "
                "that holds corpora/wordnet or corpora/wordnet.zip.",
                self.variants,
            )
        self._tokenize = NLTKWordTokenizer().tokenize
        self.version = f"nltk {version('nltk')}, WordNet {wordnet.get_version()}"

    def score(self, answer: Answer, row: BenchmarkRow) -> Sequence[float]:
        """Return the score of the best reference."""
        references = [self._tokenize(reference) for reference in row.references]
        return [float(meteor_score(references, self._tokenize(answer.text)))]


def _is_there(place: str) -> bool:
    try:
        nltk_data.find(place)
    except LookupError:
        return False
    return True
