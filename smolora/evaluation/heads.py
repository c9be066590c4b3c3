"""The heads of tasks: what asks each of them, and what its answers are measured by."""

from __future__ import annotations

from smolora.evaluation.label_asker import LabelAsker
from smolora.evaluation.span_asker import SpanAsker
from smolora.evaluation.word_asker import WordAsker
from smolora.evaluation.word_metrics import is_entity_scheme
from smolora.models.bundle import ModelBundle


def open_head(bundle: ModelBundle, *, batch_size: int) -> LabelAsker | WordAsker | SpanAsker:
    """Return what asks the head of a model; its task is one of `HEAD_TASKS`."""
    if bundle.task == "qa":
        return SpanAsker(bundle, batch_size=batch_size)
    asker = WordAsker if bundle.task == "token_classification" else LabelAsker
    return asker(bundle, batch_size=batch_size)


def choose_head_metrics(bundle: ModelBundle) -> tuple[str, ...]:
    """Return the metrics of a head's answers; of words those of entities too, where the labels mark some."""
    if bundle.task == "qa":
        return ("squad", "head_loss")
    if bundle.task == "classification":
        return ("labels", "majority", "head_loss")
    return ("words", *(("entities",) if is_entity_scheme(bundle.labels) else ()), "word_majority", "head_loss")
