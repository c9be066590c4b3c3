"""The calculator: many metrics over rows that come one by one."""

from __future__ import annotations

import tarfile
import zipfile

import nltk
import numpy as np
import pytest
from nltk.corpus import CorpusReader, LazyCorpusLoader, WordNetCorpusReader

from smolora.data.benchmark_rows import BenchmarkRow
from smolora.data.benchmarks import BENCHMARKS
from smolora.errors import ConfigError, DataError
from smolora.evaluation import meteor
from smolora.evaluation.metric import Answer, Resources
from smolora.evaluation.metrics import METRICS, MetricsCalculator, get_metrics_calculator
from tests.unit.data.conftest import require_shared

ROWS = [("the cat sat on the mat", ("the cat sat on a mat", "a cat")), ("no", ("yes",)), ("a dog", ("a dog",))]


@pytest.fixture
def fresh_wordnet(monkeypatch):
    """WordNet as before its first use: nltk keeps what it has loaded."""
    monkeypatch.setattr(
        meteor, "wordnet", LazyCorpusLoader("wordnet", WordNetCorpusReader, LazyCorpusLoader("omw", CorpusReader, []))
    )


def calculate(*metrics, rows=ROWS):
    calculator = MetricsCalculator(metrics)
    for prediction, references in rows:
        calculator.add(Answer(prediction), BenchmarkRow("", references))
    return calculator


@pytest.mark.parametrize("name", [name for name in METRICS if name not in ("logical_form", "execution", "loss")])
def test_the_names_in_the_table_are_those_that_come_out(name):
    resources = Resources(labels=("yes", "no", "a dog"))
    assert tuple(MetricsCalculator([name], resources=resources).conclude()) == METRICS[name][0]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_names_metrics_of_the_table(name):
    assert set(BENCHMARKS[name].metrics) <= set(METRICS)


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
    with pytest.raises(DataError, match="2 predictions and 1 references: there must be as many"):
        MetricsCalculator(["bleu"]).compute(["a", "b"], ["a"])


def test_a_reference_that_is_no_label_is_named_with_those_that_are():
    with pytest.raises(DataError, match=r"'Positive' is no label. Labels: negative, positive\."):
        get_metrics_calculator("sst2").compute(["positive"], ["Positive"])
    with pytest.raises(DataError, match="Labels: none"):
        get_metrics_calculator("labels").compute(["a"], ["a"])


@pytest.mark.parametrize("metrics", [("squad", "exact_match"), ("bleu", "bleu_lowercase"), ("loss", "loss")])
def test_two_metrics_of_one_name_are_refused(metrics):
    with pytest.raises(ConfigError, match="both give"):
        MetricsCalculator(metrics)


def test_a_question_without_an_answer_is_answered_by_nothing():
    squad = MetricsCalculator(["squad"])
    assert squad.compute([""], [""]) == {"exact_match": 1.0, "f1": 1.0}
    assert squad.compute(["a cat"], [""]) == {"exact_match": 0.0, "f1": 0.0}


@pytest.mark.parametrize("metric", ["bleu", "rouge", "exact_match", "squad", "labels"])
def test_a_resampling_without_rows_has_no_value(metric):
    calculator = MetricsCalculator([metric], resources=Resources(labels=("a dog barks at night",)))
    row = BenchmarkRow("", ("a dog barks at night",))
    for _ in range(2):
        calculator.add(Answer("a dog barks at night"), row)
    for score in calculator.conclude().values():
        assert score.low == score.high == pytest.approx(score.value)
    assert np.isnan(calculator.resample(METRICS[metric][0][-1])).mean() == pytest.approx(np.exp(-2), abs=0.03)


def test_empty_predictions_are_scored():
    found = MetricsCalculator(["bleu", "rouge", "nist", "distinct", "squad"]).compute(["", ""], ["x", "b c"])
    assert set(found.values()) == {0.0}


def test_one_row_has_no_interval_and_says_so():
    score = calculate("exact_match", rows=ROWS[:1]).conclude()["exact_match"]
    assert (score.value, score.low, score.reason) == (0.0, None, "no interval: too few rows")


@pytest.mark.parametrize(("metric", "name", "most"), [("exact_match", "exact_match", 1), ("bleu", "bleu1", 100)])
def test_an_interval_ends_where_values_do(metric, name, most):
    score = calculate(metric, rows=ROWS[1:]).conclude()[name]
    assert (score.low, score.high) == (0, most)


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


def test_wordnet_is_found_in_the_zip_that_the_downloader_leaves(monkeypatch, tmp_path, fresh_wordnet):
    (tmp_path / "corpora").mkdir()
    archive = require_shared("data/wordnet30_nltk_minimal.tar.xz")
    with tarfile.open(archive) as files, zipfile.ZipFile(tmp_path / "corpora" / "wordnet.zip", "w") as packed:
        for member in (member for member in files if member.isfile() and "/wordnet/" in member.name):
            packed.writestr("wordnet/" + member.name.rpartition("/")[2], files.extractfile(member).read())
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    assert METRICS["meteor"][1](Resources()).version.endswith("WordNet 3.0")


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("end", ["\r", "\v", "\f", "\x85", "\u2028"])
def test_odd_line_ends_leave_the_other_answers_in_their_places(end):
    texts = ["a pub is here", "the cheap place", "near the river"]
    calculator = calculate("cider", rows=[(text.replace(" is", f"{end}is"), (text,)) for text in texts])
    if calculator.conclude()["cider"].version is None:
        pytest.skip(calculator.conclude()["cider"].reason)
    assert (
        calculator.conclude()["cider"].value
        == calculate("cider", rows=[(t, (t,)) for t in texts]).conclude()["cider"].value
    )


def test_without_java_the_coco_metrics_say_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    score = calculate("cider").conclude()["cider"]
    assert score.value is None
    assert "java" in score.reason or "smolora[coco]" in score.reason


def test_a_calculator_goes_by_a_benchmarks_name_or_a_metrics():
    assert get_metrics_calculator("sst2").metrics == ("labels",)
    assert get_metrics_calculator("bleu").metrics == ("bleu",)
    assert get_metrics_calculator("mnli").metrics == ("labels",)
    with pytest.raises(ConfigError, match="Did you mean 'rouge'"):
        get_metrics_calculator("rogue")
    with pytest.raises(ConfigError, match="no metric 'blue'"):
        MetricsCalculator(["blue"])


def test_resampled_values_are_the_same_rows_for_two_systems():
    answers = np.random.default_rng(0).random(40) < 0.5
    right, some, others = (
        calculate("exact_match", rows=[("yes" if is_right else "no", ("yes",)) for is_right in each])
        for each in ([True] * 40, answers, ~answers)
    )
    parts = some.resample("exact_match") + others.resample("exact_match")  # Of each row one of the two is right.
    np.testing.assert_allclose(parts, right.resample("exact_match"))
    assert (some.resample("exact_match") != others.resample("exact_match")).any()
    with pytest.raises(KeyError):
        right.resample("bleu")
