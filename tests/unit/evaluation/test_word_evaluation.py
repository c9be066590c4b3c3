"""Token classifiers are evaluated word by word: the labels and numbers are those of plain transformers."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

from smolora.errors import ConfigError, DataError
from smolora.evaluation.evaluator import ModelEvaluator
from smolora.evaluation.head_rows import tag_words
from smolora.evaluation.tasks import evaluate_benchmark
from smolora.models.loading import load_model
from tests.head_runs import ask_rows
from tests.tiny import CONTEXT, save_tiny_encoder

LABELS = ("O", "B-PER", "I-PER")
ROWS = [
    {"tokens": ["the", "Eagle", "isn't", "in", "Zürich", f"{i}"][: 2 + i % 5], "tags": ["O", *LABELS * 2][: 2 + i % 5]}
    for i in range(20)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A token classifier that wasn't tuned here, with a random head."""
    folder = save_tiny_encoder("bert", tmp_path_factory.mktemp("words") / "base")
    names = dict(enumerate(LABELS))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        head = AutoModelForTokenClassification.from_pretrained(folder, id2label=names)
        torch.nn.init.normal_(head.classifier.weight)
    head.save_pretrained(folder)
    return folder


def label_naively(model, rows):
    """Return log p of the labels of every word, row by row: the logits at the token of its first character."""
    plain, tokenizer = (
        AutoModelForTokenClassification.from_pretrained(model).eval(),
        AutoTokenizer.from_pretrained(model),
    )
    for row in rows:
        encoded = tokenizer(" ".join(row["tokens"]), return_tensors="pt")
        starts = [len(" ".join([*row["tokens"][:number], ""])) for number in range(len(row["tokens"]))]
        with torch.no_grad():
            logits = plain(**encoded).logits[0]
        yield logits[[encoded.char_to_token(0, start) for start in starts]].log_softmax(-1)


def test_labels_and_numbers_are_those_of_plain_transformers(model, tmp_path):
    result = ask_rows(model, ROWS, tmp_path, out=tmp_path / "out")
    naive = list(label_naively(model, ROWS))
    labels = [[LABELS[int(line.argmax())] for line in row] for row in naive]
    kept = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [line["labels"] for line in kept] == labels and len({label for row in labels for label in row}) > 1
    right = [tag for row in ROWS for tag in row["tags"]]
    hits = [one == tag for one, tag in zip((label for row in labels for label in row), right, strict=True)]
    losses = [-line[LABELS.index(tag)] for line, tag in zip(torch.cat(naive), right, strict=True)]
    assert result.metrics["accuracy"] == pytest.approx(sum(hits) / len(hits))
    assert result.metrics["loss"] == pytest.approx(float(sum(losses)) / len(losses), rel=1e-5)
    assert result.metrics["majority_accuracy"] == pytest.approx(right.count("O") / len(right))
    assert {"f1", "entity_precision", "entity_recall", "entity_f1"} < set(result.metrics)


def test_a_stopped_evaluation_goes_on_with_the_labels_that_are_kept(model, tmp_path):
    whole = ask_rows(model, ROWS, tmp_path, out=tmp_path / "out")
    file = tmp_path / "out" / "predictions.jsonl"
    kept = file.read_text()
    file.write_text("".join(kept.splitlines(keepends=True)[:7]))
    again = ask_rows(model, ROWS, tmp_path, out=tmp_path / "out")
    assert again.metrics == pytest.approx(whole.metrics, rel=1e-5)  # Other rows are padded together.
    labels = [[json.loads(line)["labels"] for line in lines.splitlines()] for lines in (kept, file.read_text())]
    assert labels[0] == labels[1]


def test_answers_dont_depend_on_the_batch(model):
    bundle = load_model(model)
    rows = [tag_words(tuple(row["tokens"]), tuple(row["tags"])) for row in ROWS]
    one, many = (ModelEvaluator(bundle, batch_size=size).answer(rows) for size in (1, 16))
    assert [answer.labels for answer in one] == [answer.labels for answer in many]
    losses = [torch.tensor([answer.loss_sum for answer in answers]) for answers in (one, many)]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-4)  # Padded rows are rounded otherwise.


def test_words_past_the_context_count_as_wrong_and_are_counted(model, tmp_path, caplog):
    long = {"tokens": ["dog"] * CONTEXT, "tags": ["O"] * CONTEXT}
    result = ask_rows(model, [long], tmp_path, out=tmp_path / "out")
    (kept,) = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    lost = kept["labels"].count("")
    assert 0 < lost < CONTEXT and kept["labels"][-lost:] == [""] * lost
    assert f"{lost} words have no token of their own within the model's context of {CONTEXT} tokens" in caplog.text
    assert result.metrics["accuracy"] == kept["labels"].count("O") / CONTEXT


def test_a_row_without_a_token_is_wrong_and_has_no_loss(model, tmp_path):
    result = ask_rows(model, [{"tokens": [""], "tags": ["O"]}], tmp_path)
    assert result.metrics["accuracy"] == 0 and result.metrics["loss"] is None


def test_a_model_that_was_not_tuned_here_takes_the_numbers_of_its_outputs(model, tmp_path):
    by_number = [{**row, "tags": [LABELS.index(tag) for tag in row["tags"]]} for row in ROWS]
    assert ask_rows(model, by_number, tmp_path).metrics == ask_rows(model, ROWS, tmp_path).metrics


def test_labels_that_the_head_does_not_know_are_refused(model, tmp_path):
    with pytest.raises(DataError, match=r"'B-LOC' \(1 row\).*Learned are: O, B-PER, I-PER"):
        ask_rows(model, [{"tokens": ["a", "b"], "tags": ["O", "B-LOC"]}], tmp_path)


def test_rows_without_words_are_refused(model, tmp_path):
    (tmp_path / "sst2_test.jsonl").write_text(json.dumps({"text": "good", "label": 1}))
    with pytest.raises(ConfigError, match="sst2-test has no words with a label each, and this model is a token cl"):
        evaluate_benchmark("sst2", model, data_dir=tmp_path)
