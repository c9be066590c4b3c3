"""Adapters that were moved away from zero, as training would, so that a mistake shows in the logits."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import save_file

from smolora.adapters.attach import attach_adapter, quiet_peft
from smolora.adapters.store import save_adapter
from smolora.config.adapter import LoRAConfig
from smolora.models.loading import load_model
from tests.tiny import save_tiny_model


def change_json(file, **values):
    """Give keys of a JSON file other values."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def write_tensors(folder, tensors):
    """Give an adapter other tensors, as one does on purpose: it is no longer held to the bytes that were written."""
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    change_json(folder / "base_identity.json", weights=None)


def move_adapter(model, *, seed=5):
    """Give every matrix B of an adapter random numbers in place of zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def move_all(model, *, seed=5):
    """Add random numbers to everything that an adapter trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def attach_moved(bundle, **settings):
    """Attach a LoRA adapter without dropout to a bundle and move it."""
    adapted = attach_adapter(bundle, LoRAConfig(lora_dropout=0.0, **settings), seed=3)
    move_adapter(adapted.model)
    adapted.model.eval()
    return adapted


@pytest.fixture
def save_pair(tmp_path):
    """Return a function that saves a tiny base and an adapter of ours on it, and returns both folders."""

    def save(family="llama", *, base=None, **settings):
        base_folder = save_tiny_model(family, tmp_path / "base", **(base or {}))
        save_adapter(attach_moved(load_model(base_folder), **settings), tmp_path / "adapter")
        return base_folder, tmp_path / "adapter"

    return save


@pytest.fixture
def save_peft_pair(tmp_path):
    """Return a function that saves a tiny base and an adapter that plain peft made on it, and returns both folders."""

    def save(family="llama", *, base=None, **settings):
        base_folder = save_tiny_model(family, tmp_path / "base", **(base or {}))
        model = load_model(base_folder).model
        with quiet_peft():
            adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
            move_all(adapted)
            adapted.save_pretrained(tmp_path / "adapter")
        return base_folder, tmp_path / "adapter"

    return save
