"""Heads of tasks over a base: which labels one answers, whether it is kept or drawn, its type, and what it reads.

A head is float32 whatever its base is held in, since it is trained whole. Forward-reading models answer at each row's
last real token, told by the attention mask: transformers goes by the pad token's id, which many of them don't have, or
have in common with the end of text. XLNet's head answers there too, where transformers takes whatever is last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MethodType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from smolora.config.model import TaskType
from smolora.errors import ConfigError, ModelError
from smolora.models.tasks import HEAD_TASKS, LABEL_TASKS, TASK_NAMES, find_heads, read_saved_task, task_of

_INITIAL_STD = 0.02
_FORWARD_HEAD = "score"
"""What transformers calls the head of a classifier that reads forwards."""


def choose_labels(
    settings: Mapping[str, object], task: TaskType, labels: Sequence[str]
) -> tuple[tuple[str, ...], bool]:
    """Return the labels of a model's head in their order, and whether the head of its files is kept.

    A head in the files is kept where it answers the same labels, whatever their order, or where `labels` are numbers of
    its own.

    Args:
        settings: config.json.
        task: What the model is asked.
        labels: Those of the data; none to take the files'.

    Raises:
        ConfigError: A classifier without labels.
        ModelError: An encoder-decoder as a classifier.
    """
    if task in HEAD_TASKS and settings.get("is_encoder_decoder"):
        raise ModelError(
            f"a {settings['model_type']} model is an encoder-decoder, which isn't made a {TASK_NAMES[task]} here. "
            "Use an encoder (bert, roberta) or a decoder (llama, gpt2), or --task seq2seq."
        )
    has_head = read_saved_task(settings) == task
    if task not in LABEL_TASKS:
        return (), has_head
    own = _read_own_labels(settings) if has_head else ()
    if not labels and not own:
        raise ConfigError(f"a {TASK_NAMES[task]} needs labels, and this model has none. Give labels=[...].")
    if not labels or set(labels) == set(own):
        return own, True
    if own and all(label.isdecimal() and int(label) < len(own) for label in labels):
        return tuple(map(str, range(len(own)))), True
    return tuple(labels), False


def settle_head(model: PreTrainedModel, missing: Iterable[str], *, keeps_head: bool, seed: int) -> tuple[str, ...]:
    """Make the head of a model that was just opened ready to be trained; return the paths of its modules.

    Args:
        model: For one of HEAD_TASKS, or any other, which has no such head.
        missing: The tensors that its files lack, of the head or of a pooler only.
        keeps_head: Whether a head in the files stays as it is.
        seed: Draws a head that isn't there, or isn't kept.
    """
    own, lacking = find_heads(model), [name.rpartition(".")[0] for name in missing]
    poolers = dict.fromkeys(path for path in lacking if not path.startswith(tuple(f"{head}." for head in own)))
    heads = (*own, *(path.partition(".pooler")[0] + ".pooler" for path in poolers if path not in own))
    for path in dict.fromkeys(heads):
        head = model.get_submodule(path)
        head.float()
        head.register_forward_pre_hook(_widen_inputs)
    if not keeps_head or lacking:
        _draw([model.get_submodule(path) for path in dict.fromkeys(heads)], model, seed)
    if task_of(model) == "classification" and _FORWARD_HEAD in own:
        model.forward = MethodType(_classify_last_tokens, model)
    elif task_of(model) == "classification" and model.config.to_dict().get("summary_type") == "last":
        model.forward = MethodType(_classify_behind_padding, model)
    return tuple(dict.fromkeys(heads))


def is_of_head(name: str, heads: Sequence[str]) -> bool:
    """Whether a tensor is of a head that may be drawn: of one of `heads`, or of a pooler, which some bases lack."""
    return name.startswith(tuple(f"{head}." for head in heads)) or "pooler" in name.split(".")


def _read_own_labels(settings: Mapping[str, object]) -> tuple[str, ...]:
    named = settings.get("id2label")
    if not isinstance(named, dict):
        return ("LABEL_0", "LABEL_1")  # What transformers takes where config.json is silent.
    return tuple(str(named[number]) for number in sorted(named, key=int))


def _draw(heads: Sequence[nn.Module], model: PreTrainedModel, seed: int) -> None:
    std = float(model.config.to_dict().get("initializer_range") or _INITIAL_STD)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
        torch.manual_seed(seed)
        for module in (module for head in heads for module in head.modules()):
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(module, nn.Linear) and name == "weight":
                    parameter.copy_(torch.randn(parameter.shape) * std)  # On the CPU: the same on every device.
                else:
                    parameter.fill_(1.0 if name == "weight" else 0.0)


def _widen_inputs(head: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
    dtype = next(head.parameters()).dtype
    return tuple(
        value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value for value in inputs
    )


def _classify_last_tokens(
    model: PreTrainedModel,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    logits_to_keep: Tensor | None = None,
    past_key_values: object | None = None,
    **inputs: object,
) -> SequenceClassifierOutput:
    """Answer at the positions `logits_to_keep` of packed rows `[1, T]`: `[1, N, C]`; else once a row: `[B, C]`.

    Virtual tokens come before a row: as embeddings in its place, or as `past_key_values` that only the mask counts
    (peft looks for that name among the parameters).
    """
    given = {name: value for name, value in {"past_key_values": past_key_values, **inputs}.items() if value is not None}
    hidden: Tensor = model.base_model(input_ids=input_ids, attention_mask=attention_mask, **given)[0]  # [B, T, D]
    if logits_to_keep is not None:
        return SequenceClassifierOutput(logits=model.get_submodule(_FORWARD_HEAD)(hidden[:, logits_to_keep]))
    num_rows, length = hidden.shape[:2]
    places = torch.arange(length, device=hidden.device)
    mask = places.new_ones(num_rows, length) if attention_mask is None else attention_mask[:, -length:]
    last = (places * mask).argmax(dim=1)
    rows = torch.arange(num_rows, device=hidden.device)
    return SequenceClassifierOutput(logits=model.get_submodule(_FORWARD_HEAD)(hidden[rows, last]))


def _classify_behind_padding(
    model: PreTrainedModel, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **inputs: object
) -> object:
    """Answer with each row's padding moved before it: XLNet's head reads the last position, whatever is there."""
    given = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
    if attention_mask is not None:
        order = attention_mask.argsort(dim=1, stable=True)
        rows = torch.arange(len(order), device=order.device)[:, None]
        given = {
            name: value[rows, order] if isinstance(value, Tensor) and value.shape[:2] == order.shape else value
            for name, value in given.items()
        }
    return type(model).forward(model, **given)
