"""Which model a run starts from, or which GPT it builds from nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from smolora.config.base import Section

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
DeviceName = Literal["auto", "cpu", "cuda", "mps"]
Quantization = Literal["none", "8bit", "4bit"]
TaskType = Literal["causal_lm", "classification", "token_classification", "qa", "seq2seq"]


class ModelConfig(Section):
    """A pretrained model: where it is, and how it is held in memory."""

    name_or_path: str = Field(min_length=1)
    """A folder in Hugging Face format, a smolora run, or a hub id."""

    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    task_type: TaskType = "causal_lm"
    """What the model is asked to do."""

    dtype: DTypeName = "auto"
    """Type of the frozen base's weights. auto: bfloat16 where the device computes it natively, else float32."""

    quantization: Quantization = "none"
    """Bits that the linear layers of the frozen base are held in, all but the head: a half or a quarter of bfloat16's
    memory for a slower step. 8bit and 4bit (NF4) need the extra smolora[quant]."""

    device: DeviceName = "auto"
    """Where the run computes. auto: cuda, then mps, then cpu."""


class GPTConfig(Section):
    """The shape of a GPT that is trained from nothing (the GPT-2 architecture)."""

    num_layers: int = Field(default=4, ge=1)
    """Transformer blocks."""

    num_heads: int = Field(default=4, ge=1)
    """Attention heads per block; divides `width`."""

    width: int = Field(default=128, ge=1)
    """Width of the residual stream, in features."""

    context: int = Field(default=128, ge=2)
    """Longest sequence the model can read, in tokens (learned positions)."""

    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability of dropping a feature, on embeddings, attention weights and both residual branches."""

    bias: bool = False
    """Whether linear layers and norms have biases, as GPT-2 has. Without, a step is faster; saved, they are zeros."""

    activation: Literal["gelu", "gelu_new"] = "gelu"
    """gelu is the exact one, and faster on a CPU; gelu_new is the tanh approximation that GPT-2 was trained with."""

    vocab_size: int | None = Field(default=None, ge=2)
    """Rows of the embedding. Left out, it is the tokenizer's size."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> GPTConfig:
        if self.width % self.num_heads:
            raise ValueError(f"num_heads must divide width, but {self.width} is no multiple of {self.num_heads}")
        return self


class TokenizerConfig(Section):
    """The tokenizer that a pretraining run learns from its text."""

    kind: Literal["char", "bpe"] = "char"
    """char: one token a character. bpe: byte-level byte-pair encoding."""

    vocab_size: int = Field(default=2048, ge=258)
    """bpe: size of the vocabulary, the 256 bytes and the end-of-text token included."""

    def find_idle(self) -> Mapping[str, str]:
        """Return what is a bpe tokenizer's alone."""
        return {} if self.kind == "bpe" else {"vocab_size": "kind=bpe (--tokenizer bpe)"}
