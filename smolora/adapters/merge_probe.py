"""Proves a merge of any adapter on a few tokens: the merged files' logits are those of base and adapter, in float32.

Weights stay mapped from their files, in the files' type: each operation widens its own for as long as it runs. The
adapter's logits are peft's own, and so don't rest on what was merged. Few tokens read few rows of an embedding, so each
weight is held to its change beside. The proof takes three short forward passes and the memory of a few float32 weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from smolora.adapters.merge_proof import Finding, WeightProof, refuse_infinite
from smolora.adapters.merged_weights import Update
from smolora.adapters.store import load_adapter
from smolora.errors import ModelError
from smolora.models.bundle import ModelBundle
from smolora.models.loading import load_model
from smolora.models.tasks import HEAD_TASKS

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


class LogitProof:
    """Compares logits of the merged model with the adapter's."""

    def __init__(self, probe: Probe, dtype: torch.dtype) -> None:
        self._probe, self._dtype = probe, dtype
        self._weights = WeightProof()
        self._merged_dtypes: set[torch.dtype] = set()

    def check(self, name: str, update: Update, weight: Tensor, merged: Tensor) -> None:
        """Hold a merged tensor to base and adapter; of a quantised layer, raise unless it is finite.

        Raises:
            ModelError: It isn't.
        """
        if update.quantization == "none":
            self._weights.check(name, update, weight, merged)
        else:
            refuse_infinite(name, merged)
        self._merged_dtypes.add(merged.dtype)

    def conclude(self, folder: Path) -> Finding:
        """Open the merged files and compare."""
        difference, tolerance = verify_merged(load_model(folder, dtype=self._dtype), self._probe, self._merged_dtypes)
        compared = f"the logits of {self._probe.input_ids.numel()} tokens"
        return Finding(compared, self._probe.effect, difference, tolerance)


def probe_adapter(base: ModelBundle, folder: Path) -> tuple[ModelBundle, Probe]:
    """Put a saved adapter on its base; return both, and their logits on a few fixed tokens.

    Raises:
        ModelError: As `load_adapter`.
    """
    num_tokens = min(base.context or _TOKENS, _TOKENS)
    vocab_size = next(p for p in base.model.parameters() if p.ndim == 2).shape[0]
    input_ids = torch.randint(vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(0))
    plain = _compute_logits(base, input_ids)
    adapted = load_adapter(base, folder)
    logits = _compute_logits(adapted, input_ids)
    return adapted, Probe(input_ids, logits, (logits - plain).abs().max().item())


def verify_merged(merged: ModelBundle, probe: Probe, dtypes: Iterable[torch.dtype]) -> tuple[float, float]:
    """Return (largest difference of a logit, tolerance).

    A float32 file is held to 1e-5 of the largest logit (at least 1e-5), a 16-bit file to 8 roundings of its type.

    Args:
        merged: What was merged, opened from its files.
        probe: The adapter's logits.
        dtypes: The types of the merged tensors.

    Raises:
        ModelError: The merged model isn't the adapter's.
    """
    difference = (_compute_logits(merged, probe.input_ids) - probe.logits).abs().max().item()
    largest = max(1.0, probe.logits.abs().max().item())
    halves = [torch.finfo(dtype).eps for dtype in dtypes if dtype in HALF_DTYPES.values()]
    tolerance = largest * max([1e-5, *(_HALF_TOLERANCE * eps for eps in halves)])
    if not difference <= tolerance:
        raise ModelError(
            f"the merged model isn't the adapter's: a logit differs by {difference:.2e}, more than {tolerance:.2e}. "
            "Nothing was written; adapter and base are as they were."
        )
    return difference, tolerance


@torch.no_grad()
def _compute_logits(bundle: ModelBundle, input_ids: Tensor) -> Tensor:
    extra: dict[str, object] = {} if bundle.task in HEAD_TASKS else {"use_cache": False}
    if bundle.task == "seq2seq":
        extra["decoder_input_ids"] = input_ids
    with Widened():
        outputs = bundle.model(input_ids=input_ids, **extra)
    if bundle.task == "qa":
        return torch.stack((outputs.start_logits, outputs.end_logits))
    logits: Tensor = outputs.logits
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
