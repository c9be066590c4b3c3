"""Gradient checkpointing for a while: activations are recomputed in the backward pass instead of kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, cast

from torch import nn


class _Recomputing(Protocol):
    """What GPTModel and the models of transformers and peft offer, by the newer or the older name."""

    def activation_checkpointing_enable(self, kwargs: Mapping[str, bool], /) -> None: ...

    def activation_checkpointing_disable(self) -> None: ...

    def gradient_checkpointing_enable(self, kwargs: Mapping[str, bool], /) -> None: ...

    def gradient_checkpointing_disable(self) -> None: ...


@contextmanager
def recomputed_activations(model: nn.Module) -> Iterator[None]:
    """Recompute activations inside the block (Chen et al. 2016, https://arxiv.org/abs/1604.06174).

    Always the non-reentrant kind: the reentrant one fails without forced input gradients, and with them it hides a set
    of tensors that trains nothing.
    """
    recomputing = cast("_Recomputing", model)
    try:
        enable, disable = recomputing.activation_checkpointing_enable, recomputing.activation_checkpointing_disable
    except AttributeError:  # GPTModel, and transformers before 5.23, which deprecates the older name.
        enable, disable = recomputing.gradient_checkpointing_enable, recomputing.gradient_checkpointing_disable
    enable({"use_reentrant": False})
    try:
        yield
    finally:
        disable()
