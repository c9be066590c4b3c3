"""Numbers from logits: the same as scikit-learn's and torch's definitions, and Hugging Face's Trainer takes them."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from transformers import EvalPrediction, Trainer

from smolora.config import TrainingConfig
from smolora.errors import DataError
from smolora.evaluation.answers import LabelMetric
from smolora.evaluation.compute_metrics import compute_metrics, measure_labels
from smolora.evaluation.metric import Resources
from smolora.evaluation.metrics import MetricsCalculator
from tests.tiny import random_input_ids, tiny_model


def test_labels_have_the_numbers_of_evaluated_answers():
    rng = np.random.default_rng(0)
    chosen, given = rng.integers(0, 4, 50), rng.integers(0, 3, 50)
    names = tuple("abcd")
    calculator = MetricsCalculator(["labels"], resources=Resources(labels=names))
    expected = calculator.compute([names[one] for one in chosen], [names[one] for one in given])
    assert measure_labels(chosen, given) == pytest.approx(expected)
    assert set(expected) == set(LabelMetric.names)


def test_a_language_model_is_asked_for_the_next_token_where_it_isnt_ignored():
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, 3, -100, -100], [-100, -100, 4, 5, 6]])
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    found = compute_metrics(EvalPrediction(predictions=logits.numpy(), label_ids=labels.numpy()))
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert found["perplexity"] == pytest.approx(expected.exp().item(), rel=1e-6)
    choices = compute_metrics(EvalPrediction(predictions=logits.argmax(-1).numpy(), label_ids=labels.numpy()))
    assert choices == {"token_accuracy": pytest.approx(found["token_accuracy"])}


def test_labels_of_words_arent_shifted():
    labels = np.array([[0, 1, -100]])
    predicted = EvalPrediction(predictions=(np.eye(2)[[0, 1, 0]][None],), label_ids=labels)
    assert compute_metrics(predicted, task="token_classification") == {"accuracy": 1.0, "f1": 1.0}


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        (np.zeros((2, 3)), np.array([-100, -100]), "all of them are -100"),
        (np.zeros((2, 3)), np.array([0, 1, 2]), r"shape \(2, 3\) don't fit labels of shape \(3,\)"),
    ],
)
def test_what_cant_be_measured_says_why(predictions, labels, message):
    with pytest.raises(DataError, match=message):
        compute_metrics(EvalPrediction(predictions=predictions, label_ids=labels))


def test_hugging_faces_trainer_takes_them(tmp_path):
    rows = [{"input_ids": ids, "labels": ids} for ids in (random_input_ids(10, seed=seed)[0] for seed in range(4))]
    args = TrainingConfig(max_steps=1).to_training_arguments(tmp_path, use_cpu=True, dataloader_pin_memory=False)
    trainer = Trainer(
        model=tiny_model("llama"), args=args, eval_dataset=rows, compute_metrics=partial(compute_metrics, task=None)
    )
    found = trainer.evaluate()
    assert found["eval_perplexity"] == pytest.approx(np.exp(found["eval_loss"]), rel=1e-4)
    assert 0 <= found["eval_token_accuracy"] <= 1
