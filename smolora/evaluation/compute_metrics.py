"""Numbers from logits and targets: for Hugging Face's Trainer (`compute_metrics`), and for held-out rows of our own.

`N` targets, `B` rows, `T` time, `C` choices: labels, or tokens of the vocabulary.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from smolora.errors import DataError
from smolora.evaluation.answers import LabelMetric, LossMetric

IGNORED = -100
"""Hugging Face's label of a position that isn't asked."""

Array = npt.NDArray[np.generic]


class Predicted(Protocol):
    """What Hugging Face's EvalPrediction has."""

    @property
    def predictions(self) -> Array | tuple[Array, ...]: ...

    @property
    def label_ids(self) -> Array | tuple[Array, ...]: ...


def compute_metrics(
    predicted: Predicted, *, task: Literal["classification", "token_classification", "causal_lm"] | None = None
) -> dict[str, float]:
    """Return the metrics of a task, as `transformers.Trainer(compute_metrics=...)` wants them.

    A classification has accuracy and f1 (macro); a language model has token_accuracy, loss and perplexity, of the
    tokens that aren't ignored (-100), each predicted by the logits before it. Where `preprocess_logits_for_metrics` has
    made choices of the logits, a language model has token_accuracy alone.

    Args:
        predicted: Logits [B, C] or [B, T, C], or choices [B] or [B, T]; label ids [B] or [B, T]. Of a tuple, the first.
        task: Left out, one label a row is a classification, and more are a causal language model; name
            token_classification by `functools.partial(compute_metrics, task="token_classification")`.

    Raises:
        DataError: No target is left, or predictions and labels don't fit each other.

    Example:
        >>> from types import SimpleNamespace
        >>> logits, labels = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]]), np.array([0, 1, 1])
        >>> compute_metrics(SimpleNamespace(predictions=logits, label_ids=labels))["accuracy"]
        0.6666666666666666
    """
    found, given = _first(predicted.predictions), _first(predicted.label_ids)
    if given.ndim not in (found.ndim, found.ndim - 1) or found.shape[: given.ndim] != given.shape:
        raise DataError(f"predictions of shape {found.shape} don't fit labels of shape {given.shape}.")
    task = task or ("classification" if given.ndim == 1 else "causal_lm")
    if task == "causal_lm" and given.ndim > 1:  # The logits of a token predict the next one.
        found, given = found[:, :-1], given[:, 1:]
    is_asked = given != IGNORED
    found, given = found[is_asked], given[is_asked]
    if not len(given):
        raise DataError("no label is left to measure: all of them are -100.")
    if task == "causal_lm":
        return measure_tokens(found, given)
    return measure_labels(found.argmax(-1) if found.ndim > 1 else found, given)


def measure_labels(chosen: Array, given: Array) -> dict[str, float]:
    """Return accuracy and macro F1 of chosen label ids [N], as evaluations of answers have them."""
    ids = sorted({*chosen.tolist(), *given.tolist()})
    counts = np.array([[(chosen == one) & (given == one), chosen == one, given == one] for one in ids]).sum(-1)
    metric = LabelMetric([str(one) for one in ids])
    sums = np.concatenate([counts.T.ravel().astype(np.float64), [float(len(given))]])
    return dict(zip(metric.names, metric.conclude(sums), strict=True))


def measure_tokens(found: Array, given: Array) -> dict[str, float]:
    """Return token_accuracy of logits [N, C] or choices [N], and of logits loss (nats a token) and perplexity."""
    if found.ndim == 1:
        return {"token_accuracy": float((found == given).mean())}
    logits = found.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, given[:, None].astype(np.int64), -1)[:, 0]
    values = LossMetric().conclude(np.array([losses.sum(), len(given)]))
    accuracy = float((logits.argmax(-1) == given).mean())
    return {**dict(zip(LossMetric.names, values, strict=True)), "token_accuracy": accuracy}


def _first(values: Array | tuple[Array, ...]) -> Array:
    return np.asarray(values[0] if isinstance(values, tuple) else values)
