"""Switches an adapter off for a while, to see what the base does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import peft
from peft.utils import ModulesToSaveWrapper
from torch import nn

from smolora.adapters.adapter_files import trains_biases
from smolora.adapters.changes import is_soft_prompt
from smolora.adapters.state import replaced_weights
from smolora.errors import ModelError
from smolora.models.bundle import ModelBundle
from smolora.models.structure import replaced_forward


@contextmanager
def replaced_by(bundle: ModelBundle, model: nn.Module) -> Iterator[None]:
    """Compute with the weights of another model of the same architecture inside the block."""
    own, other = dict(bundle.model.named_parameters()), dict(model.named_parameters())
    _swap(own, other)
    try:
        yield
    finally:
        _swap(own, other)


def _swap(own: Mapping[str, nn.Parameter], other: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in own.items():
        parameter.data, other[name].data = other[name].data, parameter.data


@contextmanager
def disabled_adapter(bundle: ModelBundle) -> Iterator[None]:
    """Compute with the base alone inside the block; a bundle without an adapter is left as it is.

    What is frozen stays frozen: peft marks every adapter tensor trainable when it switches an adapter back on, so
    that is undone.

    Raises:
        ModelError: As `refuse_inseparable`.
    """
    if not isinstance(bundle.model, peft.PeftModel):
        yield
        return
    if bundle.taken is not None:  # Switched off, a part of the base would be missing.
        with replaced_weights(bundle, bundle.taken):
            yield
        return
    refuse_inseparable(*bundle.model.peft_config.values())
    trained = [(parameter, parameter.requires_grad) for parameter in bundle.model.parameters()]
    try:
        is_headed = is_soft_prompt(bundle.model) and bool(bundle.anatomy.heads)
        with _head_and_tokens_off(bundle.model) if is_headed else bundle.model.disable_adapter():
            yield
    finally:
        for parameter, is_trained in trained:
            parameter.requires_grad_(is_trained)


def refuse_inseparable(*configs: peft.PeftConfig) -> None:
    """Raise where an adapter changes its base in a way that switching it off doesn't undo.

    Raises:
        ModelError: It does.
    """
    for config in configs:
        replication = config.layer_replication if isinstance(config, peft.LoraConfig) else None
        if not replication and not trains_biases(config):
            continue
        setting = f"layer_replication={replication}" if replication else f"bias={config.to_dict()['bias']!r}"
        raise ModelError(
            f"an adapter with {setting} changes the base itself, so the model can't answer without it or with another. "
            "Open the base, or each adapter, by itself."
        )


@contextmanager
def _head_and_tokens_off(model: peft.PeftModel) -> Iterator[None]:
    """Do what peft 0.21 doesn't: it asks any base behind virtual tokens for `generate`, and leaves its head trained."""
    heads = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    with replaced_forward(model, model.get_base_model().forward):
        for head in heads:
            head.enable_adapters(False)
        try:
            yield
        finally:
            for head in heads:
                head.enable_adapters(True)
