"""What a model is asked, and what answers: a head over a base for each task, and the base under it.

A task is read from the name of a model's class (`...ForSequenceClassification`), which its config.json keeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from smolora.config.model import TaskType

AUTO_MODELS: dict[TaskType, Any] = {
    "causal_lm": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
    "qa": AutoModelForQuestionAnswering,
    "seq2seq": AutoModelForSeq2SeqLM,
}

_FAMILIES: dict[TaskType, Any] = {
    "causal_lm": MODEL_FOR_CAUSAL_LM_MAPPING,
    "classification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "token_classification": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "qa": MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    "seq2seq": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
}
"""The families that transformers has a model of, by their configs' classes."""

TASK_NAMES: dict[TaskType, str] = {
    "causal_lm": "causal language model",
    "classification": "text classifier",
    "token_classification": "token classifier",
    "qa": "model for question answering",
    "seq2seq": "sequence-to-sequence model",
}

_SUFFIXES: dict[str, TaskType] = {
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "qa",
    "ForConditionalGeneration": "seq2seq",
}

HEAD_TASKS: tuple[TaskType, ...] = ("classification", "token_classification", "qa")
"""Tasks whose head isn't a language model's: it is drawn for the task, trained whole, and never a LoRA target."""

LABEL_TASKS: tuple[TaskType, ...] = ("classification", "token_classification")

ASKED_BY: dict[TaskType, str] = {
    "causal_lm": "generate",
    "classification": "classify",
    "token_classification": "label_words",
    "qa": "answer",
    "seq2seq": "generate",
}
"""The method of `InferencePipeline` that asks a model of each task."""

_SHOWN_LABELS = 8


def read_task(architectures: Iterable[str]) -> TaskType:
    """Return the task of a model by the names of its classes.

    >>> read_task(["BertForSequenceClassification"]), read_task(["LlamaForCausalLM"])
    ('classification', 'causal_lm')
    """
    names = list(architectures)
    return next((task for suffix, task in _SUFFIXES.items() if any(n.endswith(suffix) for n in names)), "causal_lm")


def read_saved_task(settings: Mapping[str, object]) -> TaskType:
    """Return the task of a model by its config.json."""
    architectures = settings.get("architectures")
    return read_task(architectures if isinstance(architectures, list) else ())


def offer_tasks(config: PretrainedConfig) -> tuple[TaskType, ...]:
    """Return what a model of this family can be asked.

    An encoder sees the token that it would have to predict, so it isn't asked for text, although transformers has a
    class for that.
    """
    if config.is_encoder_decoder:
        return ("seq2seq",) if type(config) in _FAMILIES["seq2seq"] else ()
    is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not config.to_dict().get("is_decoder")
    tasks: tuple[TaskType, ...] = HEAD_TASKS if is_encoder else ("causal_lm", *HEAD_TASKS)
    return tuple(task for task in tasks if type(config) in _FAMILIES[task])


def task_of(model: nn.Module) -> TaskType:
    """Return the task of a plain model in memory."""
    return read_task([type(model).__name__])


def find_heads(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of a head that isn't a language model's: the modules with parameters outside of the base."""
    if task_of(model) not in HEAD_TASKS or not isinstance(model, PreTrainedModel):
        return ()
    return tuple(
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and next(child.parameters(), None) is not None
    )


def describe_head(task: TaskType, labels: Sequence[str]) -> str:
    """Return what a model with a task's head is, and isn't, as a sentence without its end.

    >>> describe_head("classification", ["no", "yes"])
    'this model is a text classifier (no, yes) and writes no text'
    """
    return f"this model is a {TASK_NAMES[task]}{f' ({_shorten(labels)})' if labels else ''} and writes no text"


def describe_task(task: TaskType, labels: Sequence[str]) -> str:
    """Return a task, and how many labels it tells apart.

    >>> describe_task("classification", ["no", "yes"])
    'classification of 2 labels (no, yes)'
    """
    if not labels:
        return task
    return f"{task} of {len(labels)} labels ({_shorten(labels)})"


def _shorten(labels: Sequence[str]) -> str:
    return ", ".join(labels[:_SHOWN_LABELS]) + (", ..." if len(labels) > _SHOWN_LABELS else "")
