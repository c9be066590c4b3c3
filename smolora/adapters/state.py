"""The adapter that a model in memory carries: its identity, and other weights put into it, for good or for a while."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import peft
import torch
from torch import Tensor

from smolora.adapters.adapter_files import read_adapter
from smolora.errors import ModelError
from smolora.models.bundle import ModelBundle

AdapterWeights = Mapping[str, Tensor]
"""Tensors by their names in a peft folder."""


def restore_adapter(bundle: ModelBundle, folder: Path) -> None:
    """Give the bundle's adapter the weights of `folder`, which must be of the same adapter.

    Raises:
        ModelError: The bundle carries no adapter, or the folder holds other tensors.
    """
    if not isinstance(bundle.model, peft.PeftModel):
        raise ModelError(f"{bundle.source} carries no adapter to restore.")
    stored = read_adapter(folder)
    own = peft.get_peft_model_state_dict(bundle.model, save_embedding_layers=False)
    shapes, found = ({name: t.shape for name, t in tensors.items()} for tensors in (own, stored.tensors))
    if shapes != found:
        different = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
        raise ModelError(
            f"{folder} holds another adapter: {len(different)} tensors differ in name or shape, first {different[0]}."
        )
    peft.set_peft_model_state_dict(bundle.model, dict(stored.tensors))


def copy_weights(bundle: ModelBundle) -> AdapterWeights:
    """Return the adapter's weights as they are now; nothing that is done to the model changes them."""
    tensors = peft.get_peft_model_state_dict(bundle.model, save_embedding_layers=False)
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@contextmanager
def replaced_weights(bundle: ModelBundle, weights: AdapterWeights) -> Iterator[None]:
    """Compute with other weights of the same adapter inside the block."""
    own = copy_weights(bundle)
    peft.set_peft_model_state_dict(bundle.model, dict(weights))
    try:
        yield
    finally:
        peft.set_peft_model_state_dict(bundle.model, dict(own))


def fingerprint_adapter(bundle: ModelBundle) -> str | None:
    """Return the SHA-256 of the adapter's names and weights; None where the model carries none."""
    if not isinstance(bundle.model, peft.PeftModel):
        return None
    digest = hashlib.sha256()
    tensors = peft.get_peft_model_state_dict(bundle.model, save_embedding_layers=False)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
