"""Our numbers on the outputs of real systems are those of the reference tools, to the digits that were published."""

from __future__ import annotations

import bz2
import csv
import json
import tarfile

import nltk
import pytest

from smolora.data.benchmarks import get_benchmark
from smolora.evaluation.metric import Answer, Resources
from smolora.evaluation.metrics import MetricsCalculator
from tests.unit.data.conftest import require_shared

SYSTEMS = ("chen", "forge1", "forge3", "sheff2", "slug", "tgen", "tr2", "zhang", "zhaw1")


def score(benchmark, split, folder, predictions, *metrics):
    benchmark = get_benchmark(benchmark)
    file = benchmark.find(split, require_shared(f"data/{folder}"))
    resources = Resources(labels=benchmark.labels, file=file, split=benchmark.name_split(split))
    calculator = MetricsCalculator(metrics or benchmark.metrics, resources=resources)
    for prediction, row in zip(predictions, benchmark.iter_rows(split, file), strict=True):
        calculator.add(Answer(prediction), row)
    return {name: score.value for name, score in calculator.conclude().items()}


def read_outputs(system):
    file = require_shared(f"data/e2e/system_outputs_primary/{system}.tsv")
    with file.open(newline="", encoding="utf-8-sig") as lines:
        return [row["output"] for row in csv.DictReader(lines, delimiter="\t")]


def official(system):
    return json.loads(require_shared("data/e2e/system_scores.json").read_text())[system]


@pytest.mark.parametrize("system", SYSTEMS)
def test_bleu_of_e2e_systems(system):
    found = score("e2e_nlg", "test", "e2e", read_outputs(system), "bleu_lowercase")
    assert found["bleu"] == pytest.approx(100 * official(system)["BLEU"], abs=0.0051)


@pytest.mark.parametrize(
    "system", [pytest.param("sheff2", marks=pytest.mark.slow), "zhaw1"]
)  # Shorter than the references, and longer.
def test_nist_of_e2e_systems(system):
    found = score("e2e_nlg", "test", "e2e", read_outputs(system), "nist")
    assert round(found["nist"], 4) == official(system)["NIST"]


def test_bleu_of_tgen_depends_on_case_and_on_the_number_of_references():
    assert round(score("e2e_nlg", "test", "e2e", read_outputs("tgen"), "bleu")["bleu"], 2) == 62.13


def test_rouge_of_tgen():
    found = score("e2e_nlg", "test", "e2e", read_outputs("tgen"), "rouge")
    assert [round(found[name], 4) for name in ("rouge1", "rouge2", "rougeL")] == [0.8366, 0.6035, 0.6810]


def test_the_example_of_the_e2e_metrics():
    references = require_shared("data/e2e/metrics_example/devel-conc.txt").read_text(encoding="utf-8")
    outputs = require_shared("data/e2e/metrics_example/baseline-output.txt").read_text(encoding="utf-8").splitlines()
    groups = [group.split("\n") for group in references.strip().split("\n\n")]
    found = MetricsCalculator(["bleu_lowercase", "nist"]).compute(outputs, groups)
    assert (round(found["bleu"] / 100, 4), round(found["nist"], 4)) == (0.7203, 7.8212)


def test_lead_3_on_samsum():
    lines = require_shared("data/samsum/test.jsonl").read_text(encoding="utf-8").splitlines()
    leads = [" ".join(json.loads(line)["dialogue"].splitlines()[:3]) for line in lines]
    found = score("samsum", "test", "samsum", leads, "rouge", "bleu")
    assert [round(100 * found[name], 2) for name in ("rouge1", "rouge2", "rougeL")] == [31.31, 8.68, 24.17]
    assert round(found["bleu"], 2) == 4.74


@pytest.mark.parametrize(
    ("system", "exact_match", "f1"),
    [("BERT", 74.874, 86.325), ("Match-LSTM", 61.092, 72.667), ("Logistic Regression", 34.538, 45.852)],
)
def test_systems_on_xquad(system, exact_match, f1):
    benchmark = get_benchmark("squad")
    rows = benchmark.iter_rows("test", require_shared("data/qa/xquad.en.json"))
    systems = json.loads(require_shared("data/qa/squad11_system_predictions_on_xquad_ids.json").read_text())
    [answers] = [answers for name, answers in systems.items() if name.startswith(system)]
    found = score("squad", "test", "qa", [answers.get(row.facts["asked"]["id"], "") for row in rows])
    assert [round(100 * found[name], 3) for name in ("exact_match", "f1")] == [exact_match, f1]


def test_both_logical_forms_of_wikisqls_example_predictions():
    lines = bz2.decompress(require_shared("data/wikisql/example.pred.dev.jsonl.bz2").read_bytes()).decode().splitlines()
    found = score("wikisql", "validation", "wikisql", lines, "logical_form")
    assert (round(found["logical_form"], 5), round(found["logical_form_ordered"], 5)) == (0.45208, 0.44116)


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory):
    """WordNet, where nltk finds it."""
    folder = tmp_path_factory.mktemp("wordnet")
    with tarfile.open(require_shared("data/wordnet30_nltk_minimal.tar.xz")) as archive:
        archive.extractall(folder, filter="data")
    nltk.data.path.insert(0, str(folder / "nltk_data"))
    yield
    nltk.data.path.pop(0)


def test_meteor_of_nltk_uses_wordnet(wordnet):
    found = MetricsCalculator(["meteor"]).compute(["the big cat sat"], ["the large cat sat"])
    assert found["meteor"] == 0.6388888888888888


@pytest.mark.slow
def test_meteor_of_tgen(wordnet):
    assert round(score("e2e_nlg", "test", "e2e", read_outputs("tgen"), "meteor")["meteor"], 4) == 0.7531


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::ResourceWarning")
def test_meteor_1_5_and_cider_of_tgen():
    calculator = MetricsCalculator(["meteor_1_5", "cider"])
    if missing := [score.reason for score in calculator.conclude().values() if score.version is None]:
        pytest.skip(missing[0])
    found = score("e2e_nlg", "test", "e2e", read_outputs("tgen"), "meteor_1_5", "cider")
    assert (round(found["meteor_1_5"], 4), round(found["cider"], 4)) == (0.4483, 2.2338)
