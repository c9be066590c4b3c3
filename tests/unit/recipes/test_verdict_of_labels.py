"""The verdict on a classifier: against the head it began with, and against always naming the commonest label."""

from __future__ import annotations

import json
import random

import pytest
from transformers import AutoModelForSequenceClassification

from smolora.errors import BrokenRunError
from tests.head_runs import read_verdict, tune_head
from tests.tiny import save_tiny_encoder

WORDS = ("good", "fine", "bad", "poor")


def reviews(count=200, *, label_of=lambda number: "yes" if number % 4 < 2 else "no"):
    return [{"text": f"the {WORDS[i % 4]} dog {i}", "label": label_of(i)} for i in range(count)]


def tune(tmp_path, rows, *assignments, base=None):
    size = ("data.validation_fraction=0.4", "training.max_steps=40")
    return tune_head(tmp_path, "classification", rows, *size, *assignments, base=base)


def test_a_classifier_that_learns_is_told_so_with_what_it_stands_on(tmp_path):
    found = read_verdict(tune(tmp_path, reviews()))
    assert found["verdict"] == "learned"
    assert found["metric"]["name"] == "accuracy" and found["metric"]["tuned"] == 1.0
    assert found["loss"]["high"] < 0
    assert found["majority"]["base"] < 0.6 and found["majority"]["low"] > 0.2
    assert found["samples"][0]["tuned"] == found["samples"][0]["reference"]
    assert any("a head drawn at random" in line for line in found["findings"])
    assert any("always naming the commonest label" in line for line in found["findings"])


def test_shuffled_labels_are_no_change_however_far_the_loss_falls(tmp_path):
    """Three of four are yes: the random head is beaten by far, the commonest label isn't."""
    drawn = random.Random(0)
    found = read_verdict(tune(tmp_path, reviews(label_of=lambda _: "yes" if drawn.random() < 0.75 else "no")))
    assert found["verdict"] == "no change"
    assert found["majority"]["low"] <= 0


def test_a_rate_of_zero_is_broken(tmp_path):
    with pytest.raises(BrokenRunError, match="28 of 28 trainable tensors did not move"):
        tune(tmp_path, reviews(), "training.learning_rate=0")
    assert json.loads((tmp_path / "run" / "verdict.json").read_text())["verdict"] == "broken"


def test_a_head_that_the_files_have_is_the_base_and_is_not_called_random(tmp_path):
    base = save_tiny_encoder("bert", tmp_path / "base")
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    AutoModelForSequenceClassification.from_pretrained(base, **names).save_pretrained(base)
    found = read_verdict(tune(tmp_path, reviews(), base=base))
    assert found["verdict"] == "learned" and not found["has_drawn_head"]
    assert not any("at random" in line for line in found["findings"])


def test_a_classifier_trained_whole_is_held_against_the_head_it_began_with(tmp_path):
    found = read_verdict(tune(tmp_path, reviews(), "adapter.method=full", "training.learning_rate=1e-3"))
    assert found["verdict"] == "learned" and found["has_drawn_head"]


def test_rows_too_few_to_tell_are_no_proof(tmp_path):
    found = read_verdict(tune(tmp_path, reviews(60), "data.validation_fraction=0.2"))
    assert found["verdict"] == "no change"
    assert "12 held-out rows are too few to tell" in found["reason"]
    assert "of 50 rows and more a larger data.validation_fraction" in found["reason"]
    assert "it takes 16" in found["reason"] and "paired rightly" not in found["reason"]
