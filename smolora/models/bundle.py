"""The one value that every stage of the walk passes on: a model, its tokenizer and its anatomy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from smolora.config.model import Quantization, TaskType
from smolora.data.chat import find_turn_end
from smolora.data.prompts import PromptFormat
from smolora.errors import ModelError
from smolora.models.anatomy import Anatomy
from smolora.models.gpt import GPTModel
from smolora.models.structure import find_embedding
from smolora.models.tasks import HEAD_TASKS, LABEL_TASKS

_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len")
_UNBOUNDED = ("t5", "mt5", "umt5")
"""Their positions are distances, whatever length their config.json was trained at."""
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert")
"""Their first position is behind the pad token's, which they count among their embeddings."""


@dataclass(frozen=True)
class ModelBundle:
    """A model (GPTModel, transformers' or peft's), and what every stage needs to know about it."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    anatomy: Anatomy
    source: str
    """The folder or hub id that the base weights came from."""
    fingerprint: str
    """Identity of the base weights."""
    prompt_format: PromptFormat | None = None
    """How rows were rendered when the model was tuned."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    quantization: Quantization = "none"
    """How the base's linear layers are held."""
    task: TaskType = "causal_lm"
    """What the model's head answers."""
    has_drawn_head: bool = False
    """Whether the head is new: its files have none, or one for other labels."""
    head_labels: tuple[str, ...] = ()
    """What an adapter's own head tells apart; left out, what the config names."""
    num_virtual_tokens: int = 0
    """Positions before every row that an adapter of virtual tokens takes."""
    taken: Mapping[str, Tensor] | None = None
    """What a PiSSA adapter took out of the base when it was put on, by the adapter's names on disk."""

    @property
    def context(self) -> int | None:
        """Longest sequence in tokens, virtual ones left out; None where the model sets no bound."""
        if isinstance(self.model, GPTModel):
            return self.model.config.context
        values = read_config(self.model).get_text_config().to_dict()
        if values["model_type"] in _UNBOUNDED:
            return None
        positions = next((int(values[name]) for name in _CONTEXT_NAMES if values.get(name)), None)
        if positions is None:
            return None
        if values["model_type"] in _OFFSET_POSITIONS:
            positions -= int(values["pad_token_id"]) + 1
        return positions - self.num_virtual_tokens

    @property
    def labels(self) -> tuple[str, ...]:
        """What a classifier tells apart, in the order of its outputs; none for other models."""
        if self.task not in LABEL_TASKS:
            return ()
        if self.head_labels:
            return self.head_labels
        names: dict[int, str] = read_config(self.model).id2label
        return tuple(str(names[number]) for number in range(len(names)))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._first_parameter.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the base weights; an adapter's are float32."""
        return self._first_parameter.dtype

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends an answer: the generation config's, the tokenizer's, and its chat template's."""
        found = _read_eos(self.model.generation_config) if self._writes_by_transformers else []
        found = [*found, self.tokenizer.eos_token_id]
        form = self.prompt_format
        if form is not None and form.kind == "messages":
            found = [*found, find_turn_end(self.tokenizer, form.chat_template)]
        return tuple(dict.fromkeys(id for id in found if id is not None))

    def require_embedding(self, token_id: int) -> None:
        """Raise unless the model can read `token_id`, the highest of what it is to read.

        Raises:
            ModelError: The tokenizer has more tokens than the model.
        """
        size = self._num_embeddings
        if size is not None and token_id >= size:
            token = self.tokenizer.convert_ids_to_tokens(token_id)
            raise ModelError(
                f"the tokenizer encodes {token!r} as {token_id}, and {self.source} has embeddings of {size} tokens, 0 "
                f"to {size - 1}. Where tokens were added to the tokenizer, call "
                "model.resize_token_embeddings(len(tokenizer)) in transformers and save both again."
            )

    @property
    def generation_settings(self) -> dict[str, object]:
        """What the model's own generation config sets; nothing where it has none."""
        found = self.model.generation_config if self._writes_by_transformers else None
        own = found.to_diff_dict() if isinstance(found, GenerationConfig) else {}
        return {name: value for name, value in own.items() if name != "transformers_version"}

    @property
    def num_parameters(self) -> int:
        """Parameters (scalars, not tensors), tied ones once."""
        return count_parameters(self.model)[1]

    @property
    def num_trainable_parameters(self) -> int:
        """Parameters that require a gradient."""
        return count_parameters(self.model)[0]

    @property
    def _num_embeddings(self) -> int | None:
        """Tokens that the model has an embedding of; None where it has none to look up, as Canine."""
        if isinstance(self.model, GPTModel):
            return self.model.token_embedding.num_embeddings
        embedding = find_embedding(cast("PreTrainedModel", self.model))
        return None if embedding is None else len(embedding.get_parameter("weight"))

    @property
    def _writes_by_transformers(self) -> bool:
        """Whether the model has a generation config."""
        return not isinstance(self.model, GPTModel) and self.task not in HEAD_TASKS

    @property
    def _first_parameter(self) -> nn.Parameter:
        return next(self.model.parameters())  # The token embedding, which every family defines first.


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return (trainable, all) parameters: scalars, tied ones once; 4-bit ones lie two to a byte."""
    sizes = [
        (parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1), parameter.requires_grad)
        for parameter in model.parameters()
    ]
    return sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)


def describe_trainable_parameters(model: nn.Module) -> str:
    """Return the share of trainable parameters as a sentence.

    >>> describe_trainable_parameters(nn.Linear(3, 2))
    '8 of 8 parameters are trained (100.00 %)'
    """
    trainable, total = count_parameters(model)
    return f"{trainable:,} of {total:,} parameters are trained ({100 * trainable / max(total, 1):.2f} %)"


def print_trainable_parameters(model: nn.Module | ModelBundle) -> None:
    """Print the share of trainable parameters."""
    print(describe_trainable_parameters(model.model if isinstance(model, ModelBundle) else model))  # noqa: T201 - its promise


def read_config(model: nn.Module) -> PretrainedConfig:
    """Return the transformers config of a model, also through peft.

    Raises:
        ModelError: It has none.
    """
    config = model.config
    if not isinstance(config, PretrainedConfig):
        raise ModelError(f"{type(model).__name__} has no transformers config.")
    return config


def shift_right(model: nn.Module, answer_ids: Tensor) -> Tensor:
    """Return what an encoder-decoder reads to predict `answer_ids` [B, U]: the start token, then all but the last.

    Raises:
        ModelError: Its config names no token to start with.
    """
    start = torch.full_like(answer_ids[:, :1], find_start_id(model))
    return torch.cat((start, answer_ids[:, :-1]), dim=1)


def find_start_id(model: nn.Module) -> int:
    """Return the token that an encoder-decoder's answers begin with.

    Raises:
        ModelError: Its config names none.
    """
    start = read_config(model).decoder_start_token_id
    if start is None:
        raise ModelError("the model's config.json has no decoder_start_token_id, so an answer has no beginning.")
    return int(start)


def _read_eos(generation: object) -> list[int | None]:
    found = generation.eos_token_id if isinstance(generation, GenerationConfig) else None
    return list(found) if isinstance(found, list) else [found]
