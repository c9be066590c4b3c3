"""Gradient checkpointing for a while: activations are recomputed in the backward pass instead of kept."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, cast

from torch import nn


class _Recomputing(Protocol):
    """What GPTModel, transformers and peft models have in common."""

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, bool]) -> None: ...

    def gradient_checkpointing_disable(self) -> None: ...


@contextmanager
def recomputed_activations(model: nn.Module) -> Iterator[None]:
    """Recompute activations inside the block (Chen et al. 2016, https://arxiv.org/abs/1604.06174).

    Always the non-reentrant kind: the reentrant one fails without forced input gradients, and with them it hides a set
    of tensors that trains nothing.
    """
    recomputing = cast("_Recomputing", model)
    with _renamed_method():
        recomputing.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        with _renamed_method():
            recomputing.gradient_checkpointing_disable()


@contextmanager
def _renamed_method() -> Iterator[None]:
    """Silence transformers from 5.23 on: it has a new name for these methods, which the oldest that we take lacks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`gradient_checkpointing_", FutureWarning)
        yield
