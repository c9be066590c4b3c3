"""Metrics of short answers, against counts by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from smolora.data.benchmark_rows import BenchmarkRow
from smolora.evaluation.answers import DistinctMetric, ExactMatch, LabelMetric, LossMetric, SquadMetric, read_label
from smolora.evaluation.metric import Answer

LABELS = ("entailment", "neutral", "contradiction")


def conclude(metric, pairs):
    return metric.conclude(sum(metric.measure(Answer(text), BenchmarkRow("", (right,))) for text, right in pairs))


def test_exact_match_folds_case_and_white_space_alone():
    assert conclude(ExactMatch(), [(" Yes\n sir ", "yes  SIR"), ("yes.", "yes")]) == [0.5]


def test_accuracy_and_macro_f1_of_labels():
    pairs = [("entailment", "entailment"), ("It is neutral.", "neutral"), ("neutral", "entailment"), ("?", "neutral")]
    accuracy, f1 = conclude(LabelMetric(LABELS), pairs)
    assert accuracy == 0.5
    # entailment: precision 1, recall 1/2; neutral: precision 1/2, recall 1/2; nobody said or had contradiction.
    assert f1 == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_a_label_by_likelihood_beats_the_text():
    sums = LabelMetric(LABELS).measure(Answer("neutral", label="entailment"), BenchmarkRow("", ("entailment",)))
    assert LabelMetric(LABELS).conclude(sums) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("text", "label"),
    [("Neutral, not entailment", "neutral"), ("contradictions", None), ("", None), ("(entailment)", "entailment")],
)
def test_a_label_is_the_first_whole_word(text, label):
    assert read_label(text, LABELS) == label


def test_of_labels_that_begin_alike_the_longer_is_read():
    assert read_label("not entailment", ("not", "not entailment")) == "not entailment"


def test_squad_ignores_articles_and_punctuation_and_counts_tokens():
    assert conclude(SquadMetric(), [("The cat!", "cat")]) == [1.0, 1.0]
    assert conclude(SquadMetric(), [("black cat", "the cat sat")]) == [0.0, pytest.approx(0.5)]


def test_distinct_counts_different_ngrams():
    metric = DistinctMetric()
    for text in ("a b a", "a b"):
        metric.add(Answer(text), BenchmarkRow("", ()))
    assert metric.conclude() == [2 / 5, 2 / 3]


def test_loss_is_by_token_and_perplexity_its_exponential():
    metric = LossMetric()
    rows = [Answer("", loss_sum=3.0, num_tokens=1), Answer("", loss_sum=1.0, num_tokens=3)]
    assert metric.conclude(sum(metric.measure(row, BenchmarkRow("", ())) for row in rows)) == [1.0, math.e]
    assert all(map(math.isnan, metric.conclude(np.zeros(2))))
