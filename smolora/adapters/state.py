"""The adapter that a model in memory carries: its tensors, its identity, and other weights put into it."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import peft
import torch
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from torch import Tensor

from smolora.adapters.adapter_files import CONFIG_FILE, StoredAdapter, read_adapter
from smolora.adapters.changes import is_soft_prompt
from smolora.adapters.tensors import adapter_tensors, copy_tensors, quiet_peft, to_bytes
from smolora.errors import ModelError
from smolora.models.anatomy import PEFT_PREFIX
from smolora.models.bundle import ModelBundle

AdapterWeights = Mapping[str, Tensor]
"""Tensors by their names in a peft folder."""


def fill_adapter(model: peft.PeftModel, stored: StoredAdapter, name: str = "default") -> None:
    """Give an adapter in memory the weights on disk, which must be exactly those that peft expects.

    Raises:
        ModelError: Tensors are missing, unknown or of another shape; nothing was changed.
    """
    expected = {key: tuple(tensor.shape) for key, tensor in adapter_tensors(model, name).items()}
    own = dict(model.named_parameters(remove_duplicate=False))  # A tied head has the embedding's.
    stored = _part_copies(stored, own.keys() - expected.keys())
    if stored.tensors.keys() != expected.keys():
        stored = _convert_names(stored, model, name)
    refuse_other_tensors(stored, expected)
    _refuse_other_copies(own, stored)
    with quiet_peft():
        peft.set_peft_model_state_dict(model, dict(stored.tensors), adapter_name=name)


def _convert_names(stored: StoredAdapter, model: peft.PeftModel, name: str) -> StoredAdapter:
    """Return an adapter of an older transformers, which had a module for each expert, as this one names its tensors."""
    with quiet_peft():
        tensors: dict[str, Tensor] = convert_peft_adapter_state_dict_for_transformers(
            model, model.peft_config[name], dict(stored.tensors), name
        )
    return replace(stored, tensors=tensors)


def _part_copies(stored: StoredAdapter, of_base: Container[str]) -> StoredAdapter:
    """Tell an adapter's own tensors from the embedding and the head that peft may write beside, which are the base's.

    It does so where it is asked to (save_embedding_layers), and where the base had more tokens than its folder.
    """
    copies = {key: tensor for key, tensor in stored.tensors.items() if key in of_base}
    tensors = {key: tensor for key, tensor in stored.tensors.items() if key not in copies}
    return replace(stored, tensors=tensors, base_copies={**stored.base_copies, **copies})


def _refuse_other_copies(own: Mapping[str, Tensor], stored: StoredAdapter) -> None:
    for key, copy in stored.base_copies.items():
        weight = own.get(key)
        if weight is None or not _is_same(copy, weight.detach().cpu()):
            raise ModelError(
                f"{stored.folder} brings a {key.removeprefix(PEFT_PREFIX)} that isn't this base's. It was trained on "
                "another base, or on one with further tokens; name that one. If that was never saved, open the adapter "
                "with peft as in training, and save base and tokenizer: .unload().save_pretrained(FOLDER)."
            )


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same numbers, or would be before each was rounded to a type of its own."""
    if one.shape != other.shape or one.dtype == other.dtype:
        return torch.equal(one, other)
    return torch.allclose(one.float(), other.float(), rtol=2**-7, atol=1e-7)


def refuse_other_tensors(stored: StoredAdapter, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise unless the tensors on disk are those `expected`, which are shapes by the names in a peft folder.

    Raises:
        ModelError: Tensors are missing, unknown or of another shape.
    """
    found = {key: tuple(tensor.shape) for key, tensor in stored.tensors.items()}
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unknown:
        raise ModelError(
            f"{stored.folder} doesn't hold what its {CONFIG_FILE} promises on this base: {len(missing)} tensors are "
            f"missing {missing[:1]}, {len(unknown)} are not expected {unknown[:1]}. It is damaged, or another model's."
        )
    if different := next((key for key in expected if expected[key] != found[key]), None):
        raise ModelError(
            f"{stored.folder}: {different} is {list(found[different])}, and this base takes "
            f"{list(expected[different])}. It is for another model."
        )


def restore_adapter(bundle: ModelBundle, folder: Path) -> None:
    """Give the bundle's adapter the weights of `folder`, which must be of the same adapter.

    Raises:
        ModelError: The bundle carries no adapter, or the folder holds other tensors.
    """
    if not isinstance(bundle.model, peft.PeftModel):
        raise ModelError(f"{bundle.source} carries no adapter to restore.")
    fill_adapter(bundle.model, read_adapter(folder))


_START = "start/"


def training_tensors(bundle: ModelBundle) -> dict[str, Tensor]:
    """Return what a checkpoint needs beside the saved adapter: nothing, for most methods.

    The network behind virtual tokens isn't part of a saved adapter; PiSSA's matrices are joined there with their start.
    What is named here is all that is restored, so a head that is trained whole is among it.
    """
    parameters = dict(bundle.model.named_parameters())
    if is_soft_prompt(bundle.model):
        return _select(parameters, "prompt_encoder.", ".modules_to_save.")
    if bundle.taken is None:
        return {}
    trained = _select(parameters, ".lora_A.", ".lora_B.", ".modules_to_save.")
    return trained | {f"{_START}{name}": tensor for name, tensor in bundle.taken.items()}


def _select(parameters: Mapping[str, Tensor], *parts: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in parameters.items() if any(part in name for part in parts)}


@torch.no_grad()
def restore_training(bundle: ModelBundle, tensors: AdapterWeights, folder: Path) -> None:
    """Take back what `training_tensors` gave.

    Raises:
        ModelError: They are another adapter's, or PiSSA took something else out of the base then.
    """
    own = training_tensors(bundle)
    shapes, found = ({name: tuple(t.shape) for name, t in kept.items()} for kept in (own, tensors))
    if shapes != found:
        raise ModelError(f"{folder} holds another adapter: {sorted(shapes.items() ^ found.items())[:2]}.")
    for name, tensor in tensors.items():
        if name.startswith(_START) and not torch.equal(own[name].cpu(), tensor):
            raise ModelError(
                f"{folder} took other directions out of the base than this machine does, so the run can't go on here. "
                "Resume it on the machine and with the library versions of its env.json, or start anew."
            )
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def copy_weights(bundle: ModelBundle) -> AdapterWeights:
    """Return the adapter's weights as they are now; nothing that is done to the model changes them."""
    assert isinstance(bundle.model, peft.PeftModel), "an adapter is on"
    return copy_tensors(bundle.model)


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
    for name, tensor in sorted(adapter_tensors(bundle.model).items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(to_bytes(tensor))
    return digest.hexdigest()
