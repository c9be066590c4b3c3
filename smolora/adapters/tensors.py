"""The tensors of an adapter in memory, by the names that they have on disk."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import peft
import torch
from torch import Tensor


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence peft's warnings inside the block; what matters in them is checked and raised by us.

    Among them: peft 0.21 uses a property that transformers 5 deprecates, and it tells that it has set fan_in_fan_out
    for GPT-2, whose matrices are stored [in, out].
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def adapter_tensors(model: peft.PeftModel, name: str = "default") -> dict[str, Tensor]:
    """Return what peft saves of an adapter."""
    with quiet_peft():
        tensors: dict[str, Tensor] = peft.get_peft_model_state_dict(
            model, adapter_name=name, save_embedding_layers=False
        )
    return tensors


def copy_tensors(model: peft.PeftModel) -> dict[str, Tensor]:
    """Return what peft saves of an adapter, as it is now; nothing that is done to the model changes it."""
    return {name: tensor.detach().clone() for name, tensor in adapter_tensors(model).items()}


def to_bytes(tensor: Tensor) -> bytes:
    """Return a tensor as it lies in memory."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
