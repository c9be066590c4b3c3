"""`BaseModelWrapper`: a ModelBundle under the name that older scripts use."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from smolora.models.bundle import ModelBundle, print_trainable_parameters
from smolora.models.loading import load_model


class BaseModelWrapper:
    """A pretrained model and its tokenizer, opened; `bundle` is what every other part of the package takes."""

    def __init__(self, name_or_path: str, *, dtype: torch.dtype | None = None, device: str = "cpu") -> None:
        self.bundle: ModelBundle = load_model(name_or_path, dtype=dtype, device=device)

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.bundle.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return self.bundle.tokenizer

    def print_trainable_parameters(self) -> None:
        """Print the share of trainable parameters."""
        print_trainable_parameters(self.bundle)
