"""The table of metrics, and the calculator that computes several of them row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate

import numpy as np

from smolora.data.benchmark_rows import BenchmarkRow
from smolora.data.benchmarks import BENCHMARKS, get_benchmark, resolve_name
from smolora.errors import ConfigError, DataError, did_you_mean
from smolora.evaluation.answers import (
    DistinctMetric,
    ExactMatch,
    HeadLossMetric,
    LabelMetric,
    LossMetric,
    MajorityMetric,
    SquadMetric,
)
from smolora.evaluation.bootstrap import Tally, find_interval
from smolora.evaluation.metric import (
    Answer,
    CorpusMetric,
    MetricScore,
    MissingResource,
    Resources,
    SummedMetric,
    Sums,
    finite,
)
from smolora.evaluation.sql import Execution, LogicalForm
from smolora.evaluation.word_metrics import EntityMetric, WordMajorityMetric, WordMetric

Metric = SummedMetric | CorpusMetric


def _bleu(resources: Resources, *, lowercase: bool = False) -> Metric:
    from smolora.evaluation.bleu import BleuMetric

    return BleuMetric(lowercase=lowercase)


def _nist(resources: Resources) -> Metric:
    from smolora.evaluation.bleu import NistMetric

    return NistMetric()


def _rouge(resources: Resources) -> Metric:
    from smolora.evaluation.rouge import RougeMetric

    return RougeMetric()


def _meteor(resources: Resources) -> Metric:
    from smolora.evaluation.meteor import MeteorMetric

    return MeteorMetric()


def _coco(resources: Resources, name: str) -> Metric:
    from smolora.evaluation.coco import CocoMetric

    return CocoMetric(name)


METRICS: Mapping[str, tuple[tuple[str, ...], Callable[[Resources], Metric]]] = {
    "bleu": (("bleu1", "bleu2", "bleu3", "bleu"), _bleu),
    "bleu_lowercase": (("bleu1", "bleu2", "bleu3", "bleu"), partial(_bleu, lowercase=True)),
    "nist": (("nist",), _nist),
    "rouge": (("rouge1", "rouge2", "rougeL", "rougeLsum"), _rouge),
    "meteor": (("meteor",), _meteor),
    "meteor_1_5": (("meteor_1_5",), partial(_coco, name="meteor_1_5")),
    "cider": (("cider",), partial(_coco, name="cider")),
    "distinct": (DistinctMetric.names, lambda _: DistinctMetric()),
    "exact_match": (ExactMatch.names, lambda _: ExactMatch()),
    "labels": (LabelMetric.names, lambda resources: LabelMetric(resources.labels)),
    "squad": (SquadMetric.names, lambda _: SquadMetric()),
    "logical_form": (LogicalForm.names, lambda _: LogicalForm()),
    "execution": (Execution.names, Execution),
    "loss": (LossMetric.names, lambda _: LossMetric()),
    "majority": (MajorityMetric.names, lambda resources: MajorityMetric(resources.labels)),
    "words": (WordMetric.names, lambda resources: WordMetric(resources.labels)),
    "entities": (EntityMetric.names, lambda _: EntityMetric()),
    "word_majority": (WordMajorityMetric.names, lambda resources: WordMajorityMetric(resources.labels)),
    "head_loss": (HeadLossMetric.names, lambda _: HeadLossMetric()),
}
"""By name: what numbers it gives, and how it is made. One that lacks a resource raises MissingResource."""


class MetricsCalculator:
    """Computes metrics from answers that come one by one, with intervals.

    >>> MetricsCalculator(["exact_match"]).compute(["Yes", "no"], ["yes", ["No.", "nope"]])
    {'exact_match': 0.5}
    """

    def __init__(self, metrics: Sequence[str], *, resources: Resources | None = None, seed: int = 0) -> None:
        """Choose metrics of `METRICS`.

        Raises:
            ConfigError: There is none of a name, or two give numbers of one name.
        """
        self.metrics = tuple(metrics)
        _check_names(self.metrics)
        self._resources = resources or Resources()
        self._seed = seed
        self._summed: list[SummedMetric] = []
        self._whole: list[CorpusMetric] = []
        self._missing: dict[str, MetricScore] = {}
        for name in self.metrics:
            self._make(name)
        widths = [metric.width for metric in self._summed]
        ends = list(accumulate(widths))
        self._slices = [slice(end - width, end) for width, end in zip(widths, ends, strict=True)]
        self._tally = Tally(sum(widths), seed=seed)

    @property
    def num_rows(self) -> int:
        """Rows that were added."""
        return self._tally.num_rows

    def add(self, answer: Answer, row: BenchmarkRow) -> dict[str, float | None]:
        """Take in one row, and return the scores that it would have alone."""
        parts = [metric.measure(answer, row) for metric in self._summed]
        self._tally.add(np.concatenate([np.zeros(0), *parts]))
        for metric in self._whole:
            metric.add(answer, row)
        scores: dict[str, float | None] = {}
        for summed, part in zip(self._summed, parts, strict=True):
            scores |= {name: finite(value) for name, value in zip(summed.names, summed.conclude(part), strict=True)}
        return scores

    def conclude(self) -> dict[str, MetricScore]:
        """Return every number, with its variant, its version and its interval."""
        scores = dict(self._missing)
        for metric, part in zip(self._summed, self._slices, strict=True):
            scores |= self._score(metric, part)
        for whole in self._whole:
            scores |= _score_whole(whole)
        return {name: scores[name] for metric in self.metrics for name in METRICS[metric][0]}

    def resample(self, name: str) -> Sums:
        """Return the values of a number on the resampled rows, in an order that depends on the seed alone.

        Raises:
            KeyError: It has none.
        """
        for metric, part in zip(self._summed, self._slices, strict=True):
            if name in metric.names:
                return self._conclude_resampled(metric, part)[:, metric.names.index(name)]
        raise KeyError(name)

    def compute(self, predictions: Iterable[str], references: Iterable[str | Sequence[str]]) -> dict[str, float | None]:
        """Score predictions against their references, apart from what was added before.

        Raises:
            DataError: There are not as many references as predictions, or a reference is no label where one is needed.
        """
        found, given = list(predictions), list(references)
        if len(found) != len(given):
            raise DataError(f"{len(found):,} predictions and {len(given):,} references: there must be as many.")
        fresh = MetricsCalculator(self.metrics, resources=self._resources, seed=self._seed)
        for prediction, right in zip(found, given, strict=True):
            fresh.add(Answer(prediction), BenchmarkRow("", (right,) if isinstance(right, str) else tuple(right)))
        return {name: score.value for name, score in fresh.conclude().items()}

    def _make(self, name: str) -> None:
        names, make = METRICS[name]
        try:
            metric = make(self._resources)
        except MissingResource as missing:
            variants = zip(names, missing.variants, strict=True)
            self._missing |= {one: MetricScore(None, variant, reason=str(missing)) for one, variant in variants}
            return
        if isinstance(metric, SummedMetric):
            self._summed.append(metric)
        else:
            self._whole.append(metric)

    def _score(self, metric: SummedMetric, part: slice) -> dict[str, MetricScore]:
        if not self.num_rows:
            return {
                name: MetricScore(None, variant, metric.version, reason="no rows") for name, variant in _pairs(metric)
            }
        values = metric.conclude(self._tally.sums[part])
        resampled = self._conclude_resampled(metric, part)
        scores = {}
        for index, (name, variant) in enumerate(_pairs(metric)):
            interval = find_interval(resampled[:, index], num_rows=self.num_rows)
            low, high = (min(max(0.0, end), metric.most) for end in interval) if interval else (None, None)
            reason = None if interval else "no interval: too few rows"
            scores[name] = MetricScore(finite(values[index]), variant, metric.version, low, high, reason)
        return scores

    def _conclude_resampled(self, metric: SummedMetric, part: slice) -> Sums:
        with np.errstate(invalid="ignore", divide="ignore"):  # A resampling of few rows may hold none.
            values = np.array([metric.conclude(sums) for sums in self._tally.resampled[:, part]])
        values[self._tally.num_resampled == 0] = np.nan
        return values


def get_metrics_calculator(name: str, *, resources: Resources | None = None, seed: int = 0) -> MetricsCalculator:
    """Return the calculator of a benchmark, or of one metric.

    Raises:
        ConfigError: There is neither of that name.
    """
    if name in METRICS:
        return MetricsCalculator([name], resources=resources, seed=seed)
    if resolve_name(name) not in BENCHMARKS:
        known = (*BENCHMARKS, *METRICS)
        raise ConfigError(f"no benchmark or metric {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    benchmark = get_benchmark(name)
    return MetricsCalculator(benchmark.metrics, resources=resources or Resources(labels=benchmark.labels), seed=seed)


def _check_names(metrics: Sequence[str]) -> None:
    giver: dict[str, str] = {}
    for metric in metrics:
        if metric not in METRICS:
            raise ConfigError(f"no metric {metric!r}.{did_you_mean(metric, METRICS)} Metrics: {', '.join(METRICS)}.")
        for name in METRICS[metric][0]:
            if name in giver:
                raise ConfigError(f"{giver[name]!r} and {metric!r} both give {name}: choose one of the two.")
            giver[name] = metric


def _score_whole(metric: CorpusMetric) -> dict[str, MetricScore]:
    try:
        values = metric.conclude()
    except MissingResource as missing:
        return {name: MetricScore(None, variant, reason=str(missing)) for name, variant in _pairs(metric)}
    reason = "no interval: it needs all rows at once"
    return {
        name: MetricScore(finite(value), variant, metric.version, reason=reason)
        for value, (name, variant) in zip(values, _pairs(metric), strict=True)
    }


def _pairs(metric: Metric) -> Iterable[tuple[str, str]]:
    return zip(metric.names, metric.variants, strict=True)
