"""A GPT from nothing: seeded weights, a tokenizer, and the bundle that every later stage takes."""

from __future__ import annotations

import hashlib

import torch
from transformers import PreTrainedTokenizerBase

from smolora.config.model import GPTConfig
from smolora.errors import ConfigError
from smolora.models.anatomy import build_anatomy
from smolora.models.bundle import ModelBundle
from smolora.models.gpt import GPTModel
from smolora.runtime.seeding import derive_seed


def build_gpt(
    config: GPTConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, device: torch.device | str = "cpu"
) -> ModelBundle:
    """Return an untrained GPT of the shape `config` over the tokenizer's vocabulary.

    The weights are a pure function of config, vocabulary size and seed; torch's global generator stays as it was.

    Raises:
        ConfigError: `config.vocab_size` is set and too small for the tokenizer.
    """
    if config.vocab_size is not None and config.vocab_size < len(tokenizer):
        raise ConfigError(f"gpt.vocab_size: {config.vocab_size} is below the tokenizer's {len(tokenizer)} tokens.")
    shape = config.replace(vocab_size=config.vocab_size or len(tokenizer))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weights"))
        model = GPTModel(shape).to(device)
    identity = hashlib.sha256(f"{shape.model_dump_json()}/{seed}".encode()).hexdigest()
    return ModelBundle(model, tokenizer, build_anatomy(model), source="from nothing", fingerprint=identity)
