"""The calculator: many metrics over rows that come one by one."""

from __future__ import annotations

import nltk
import numpy as np
import pytest

from smolora.data.benchmark_rows import BenchmarkRow
from smolora.data.benchmarks import BENCHMARKS
from smolora.errors import ConfigError, DataError
from smolora.evaluation.metric import Answer, Resources
from smolora.evaluation.metrics import METRICS, MetricsCalculator, get_metrics_calculator

ROWS = [("the cat sat on the mat", ("the cat sat on a mat", "a cat")), ("no", ("yes",)), ("a dog", ("a dog",))]


def calculate(*metrics, rows=ROWS):
    calculator = MetricsCalculator(metrics)
    for prediction, references in rows:
        calculator.add(Answer(prediction), BenchmarkRow("", references))
    return calculator


@pytest.mark.parametrize("name", [name for name in METRICS if name not in ("logical_form", "execution", "loss")])
def test_the_names_in_the_table_are_those_that_come_out(name):
    resources = Resources(labels=("yes", "no", "a dog"))
    assert tuple(MetricsCalculator([name], resources=resources).conclude()) == METRICS[name][0]


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=str)
def test_every_benchmark_names_metrics_of_the_table(benchmark):
    assert set(benchmark.metrics) <= set(METRICS)


def test_the_value_lies_in_its_interval_and_says_what_it_is():
    score = calculate("bleu").conclude()["bleu"]
    assert score.low < score.value < score.high
    assert score.variant == "corpus BLEU-4, 13a tokens, case mixed, smoothing exp"
    assert score.version.startswith("sacrebleu 2.")


def test_a_row_is_scored_as_if_it_were_alone():
    calculator = MetricsCalculator(["bleu", "exact_match"])
    scores = calculator.add(Answer("a dog barks at night"), BenchmarkRow("", ("a dog barks at night",)))
    assert (scores["bleu"], scores["exact_match"]) == (pytest.approx(100), 1.0)


def test_rows_one_by_one_give_what_all_of_them_give():
    predictions, references = zip(*ROWS, strict=True)
    metrics = ("bleu", "rouge", "nist", "distinct", "exact_match")
    together = MetricsCalculator(metrics).compute(predictions, references)
    assert together == {name: score.value for name, score in calculate(*metrics).conclude().items()}


def test_as_many_references_as_predictions_are_needed():
    with pytest.raises(DataError, match="as many"):
        MetricsCalculator(["bleu"]).compute(["a", "b"], ["a"])


def test_empty_predictions_are_scored():
    found = MetricsCalculator(["bleu", "rouge", "nist", "distinct", "squad"]).compute(["", ""], ["x", "b c"])
    assert set(found.values()) == {0.0}


def test_one_row_has_no_interval_and_says_so():
    score = calculate("exact_match", rows=ROWS[:1]).conclude()["exact_match"]
    assert (score.value, score.low, score.reason) == (0.0, None, "no interval: too few rows")


def test_no_rows_are_no_number():
    assert [score.reason for score in calculate("exact_match", rows=[]).conclude().values()] == ["no rows"]


def test_a_missing_resource_is_a_null_with_its_reason(monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [])
    calculator = calculate("meteor", "exact_match")
    score = calculator.conclude()["meteor"]
    assert score.value is None
    assert "NLTK_DATA" in score.reason
    assert "not METEOR 1.5" in score.variant
    assert calculator.conclude()["exact_match"].value == pytest.approx(1 / 3)


def test_without_java_the_coco_metrics_say_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    score = calculate("cider").conclude()["cider"]
    assert score.value is None
    assert "java" in score.reason or "smolora[coco]" in score.reason


def test_a_calculator_goes_by_a_benchmarks_name_or_a_metrics():
    assert get_metrics_calculator("sst2").metrics == ("labels",)
    assert get_metrics_calculator("bleu").metrics == ("bleu",)
    with pytest.raises(ConfigError, match="Did you mean 'rouge'"):
        get_metrics_calculator("rogue")
    with pytest.raises(ConfigError, match="no metric 'blue'"):
        MetricsCalculator(["blue"])


def test_resampled_values_are_the_same_rows_for_two_systems():
    first, second = calculate("exact_match"), calculate("exact_match")
    np.testing.assert_array_equal(first.resample("exact_match"), second.resample("exact_match"))
    with pytest.raises(KeyError):
        first.resample("bleu")
