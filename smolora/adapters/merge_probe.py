"""Proves a merge on a few tokens: the merged files' logits against those of base and adapter, all in float32.

Weights stay mapped from their files, in the files' type: each operation widens its own for as long as it runs. The
adapter's logits are peft's own, and so don't rest on what was merged. The proof takes three short forward passes and
the memory of one float32 weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from smolora.adapters.toggling import disabled_adapter
from smolora.errors import ModelError
from smolora.models.bundle import ModelBundle

_TOKENS = 8
HALF_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}
_READ_DTYPE = vars(torch._C.TensorBase)["dtype"].__get__
_HALF_TOLERANCE = 8  # Roundings of the file's type, relative to the largest logit.


@dataclass(frozen=True)
class Probe:
    """The adapter's logits on a few tokens, before anything is merged."""

    input_ids: Tensor
    logits: Tensor
    effect: float
    """Largest change of a logit by the adapter."""


def probe_adapter(bundle: ModelBundle) -> Probe:
    """Return the logits of base and adapter on a few fixed tokens."""
    num_tokens = min(bundle.context or _TOKENS, _TOKENS)
    vocab_size = next(p for p in bundle.model.parameters() if p.ndim == 2).shape[0]
    input_ids = torch.randint(vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(0))
    with disabled_adapter(bundle):
        plain = _compute_logits(bundle, input_ids)
    logits = _compute_logits(bundle, input_ids)
    return Probe(input_ids, logits, (logits - plain).abs().max().item())


def verify_merged(merged: ModelBundle, probe: Probe, dtypes: Iterable[str]) -> tuple[float, float]:
    """Return (largest difference of a logit, tolerance).

    A float32 file is held to 1e-5 of the largest logit (at least 1e-5), a 16-bit file to 8 roundings of its type.

    Args:
        merged: What was merged, opened from its files.
        probe: The adapter's logits.
        dtypes: The types of the merged tensors, in safetensors' words.

    Raises:
        ModelError: The merged model isn't the adapter's.
    """
    difference = (_compute_logits(merged, probe.input_ids) - probe.logits).abs().max().item()
    largest = max(1.0, probe.logits.abs().max().item())
    halves = [torch.finfo(HALF_DTYPES[name]).eps for name in dtypes if name in HALF_DTYPES]
    tolerance = largest * max([1e-5, *(_HALF_TOLERANCE * eps for eps in halves)])
    if not difference <= tolerance:
        raise ModelError(
            f"the merged model isn't the adapter's: a logit differs by {difference:.2e}, more than {tolerance:.2e}. "
            "Nothing was written; adapter and base are as they were."
        )
    return difference, tolerance


@torch.no_grad()
def _compute_logits(bundle: ModelBundle, input_ids: Tensor) -> Tensor:
    with Widened():
        logits: Tensor = bundle.model(input_ids=input_ids, use_cache=False).logits
    return logits


class Widened(TorchFunctionMode):
    """Hands every operation its 16-bit tensors in float32, so that nothing is rounded but what lies in the files."""

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        named = kwargs if isinstance(kwargs, dict) else {}
        if func.__name__ == "__get__" and func != _READ_DTYPE:
            return func(*args)  # A shape or a device, which needs no copy.
        return func(*map(_widen, args), **{name: _widen(value) for name, value in named.items()})


def _widen(value: object) -> object:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF_DTYPES.values() else value
