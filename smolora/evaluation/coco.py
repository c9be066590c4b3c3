"""METEOR 1.5 and CIDEr as the E2E challenge reports them, by pycocoevalcap, which enters by this file and needs Java.

Both look at all rows at once, so the answers and references are held in memory until the end.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version

from smolora.data.benchmark_rows import BenchmarkRow
from smolora.evaluation.metric import Answer, CorpusMetric, MissingResource

_VARIANTS = {
    "meteor_1_5": "METEOR 1.5 (Java), English, PTB tokens, lowercase",
    "cider": "CIDEr-D, document frequencies of the references, PTB tokens, lowercase",
}

Tokens = Mapping[int, Sequence[str]]


class CocoMetric(CorpusMetric):
    """One of the two."""

    def __init__(self, name: str) -> None:
        """Find the extra and Java.

        Raises:
            MissingResource: One of them isn't there.
        """
        self.names = (name,)
        self.variants = (_VARIANTS[name],)
        if importlib.util.find_spec("pycocoevalcap") is None:
            raise MissingResource("pycocoevalcap isn't installed: pip install 'smolora[coco]'.", self.variants)
        if shutil.which("java") is None:
            raise MissingResource("there is no java on the path, which pycocoevalcap runs.", self.variants)
        self.version = f"pycocoevalcap {version('pycocoevalcap')}"
        self._answers: list[str] = []
        self._references: list[tuple[str, ...]] = []

    def add(self, answer: Answer, row: BenchmarkRow) -> None:
        """Keep one row, each text on one line: the tools read lines, and end them at more than a line feed."""
        self._answers.append(_flatten(answer.text))
        self._references.append(tuple(map(_flatten, row.references)))

    def conclude(self) -> Sequence[float]:
        """Run the tools over all rows.

        Raises:
            MissingResource: Java fails.
        """
        if not self._answers:
            return [math.nan]
        try:
            return [self._run()]
        except (OSError, ValueError, AssertionError) as error:  # What comes out of a Java that has died can't be read.
            raise MissingResource(f"java failed: {error or type(error).__name__}.", self.variants) from error

    def _run(self) -> float:
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        tokenizer = PTBTokenizer()
        found = tokenizer.tokenize({row: [{"caption": text}] for row, text in enumerate(self._answers)})
        right = tokenizer.tokenize(
            {row: [{"caption": text} for text in texts] for row, texts in enumerate(self._references)}
        )
        return _score_meteor(right, found) if self.names[0] == "meteor_1_5" else _score_cider(right, found)


def _flatten(text: str) -> str:
    return " ".join(text.split())


def _score_meteor(references: Tokens, answers: Tokens) -> float:
    from pycocoevalcap.meteor.meteor import Meteor

    meteor = Meteor()
    with ExitStack() as stack:  # It ends its process when it is collected, and leaves two pipes open.
        stack.callback(meteor.meteor_p.stderr.close)
        stack.callback(meteor.meteor_p.stdout.close)
        try:
            score, _ = meteor.compute_score(references, answers)
        finally:
            if meteor.lock.locked():  # After an error it is, and the destructor would wait for it for ever.
                meteor.lock.release()
    return float(score)


def _score_cider(references: Tokens, answers: Tokens) -> float:
    from pycocoevalcap.cider.cider import Cider

    score, _ = Cider().compute_score(references, answers)
    return float(score)
