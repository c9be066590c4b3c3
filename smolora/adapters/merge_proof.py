"""Proves a merge weight by weight, on the numbers that lie in the merged file.

On random vectors x, a merged weight must give what the layer of the base and the adapter give, of LoRA by its
definition: W' x = W x + scaling * B (A x). Layers multiply by these weights and by nothing else, so with every other
tensor the base's, byte for byte, the merged model is base and adapter for any input, up to the rounding of the file's
type. No model is run for that: it takes two thin products a weight.

`N` vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from smolora.adapters.changes import Change, Experts, LowRank
from smolora.adapters.merged_weights import Update
from smolora.errors import ModelError
from smolora.runtime.device import has_native_bfloat16

_VECTORS = 8
"""A row that is off by four times the tolerance passes on one vector with a chance of .2, on all with 2e-6."""

_ROUNDINGS = 4
"""One rounding moves a weight by half an eps of itself at most, and no number of a vector is larger than some 5."""

_ARITHMETIC = 1e-5
"""What float32 sums in another order may differ by; 3.5e-6 was seen on rows of 1,536, 3e-6 on 32,768."""


@dataclass(frozen=True)
class Finding:
    """What a proof compared, and found."""

    compared: str
    effect: float
    """Largest change by the adapter."""
    difference: float
    """Largest difference between what was merged, and base and adapter."""
    tolerance: float
    """What `difference` was held to."""


class Proof(Protocol):
    """How a merge is held to base and adapter."""

    def check(self, name: str, update: Update, weight: Tensor, merged: Tensor) -> None:
        """Look at one tensor of the base, and at what was written for it, read back."""

    def conclude(self, folder: Path) -> Finding:
        """Return what was found, when all is written to `folder`."""


class WeightProof:
    """Compares each weight, in any thread; numbers are shares of the length of the weight's row."""

    def __init__(self) -> None:
        self._found: list[tuple[float, float, float]] = []
        self._vectors: dict[int, Tensor] = {}

    def check(self, name: str, update: Update, weight: Tensor, merged: Tensor) -> None:
        """Hold a merged tensor to the base's `weight` and the update, both as the files have them.

        Raises:
            ModelError: It isn't finite, or isn't what base and adapter compute.
        """
        assert update.quantization == "none", "the layer multiplied by the weight that lies in the file"
        weight, merged = (w.T if update.is_transposed else w for w in (weight, merged))
        base, found = _as_matrix(weight), _as_matrix(merged)  # [out, in]
        x = self._draw(base.shape[1])
        change = _respond(update.change, weight, x)  # [N, out]
        wide = base.float()
        length = _measure_lengths(wide).add_(change.abs().amax(0)).clamp_(min=torch.finfo(torch.float32).tiny)
        difference = ((_multiply_difference(x, found, base, wide) - change).abs() / length).max().item()
        tolerance = max(_ARITHMETIC, _ROUNDINGS * torch.finfo(merged.dtype).eps)
        if not difference <= tolerance:
            refuse_infinite(name, merged)
            raise ModelError(
                f"{name} merged isn't base and adapter: an output differs by {difference:.2e} of its row's length, "
                f"more than {tolerance:.2e}. Nothing was written; adapter and base are as they were."
            )
        self._found.append(((change.abs() / length).max().item(), difference, tolerance))

    def conclude(self, folder: Path) -> Finding:
        """Return the largest numbers of all weights."""
        compared = f"each merged weight on {_VECTORS} random vectors, as shares of its row's length"
        effect, difference, tolerance = map(max, zip((0.0, 0.0, 0.0), *self._found, strict=True))
        return Finding(compared, effect, difference, tolerance)

    def _draw(self, width: int) -> Tensor:
        """Return the vectors [N, width], the same for all weights of this width; bfloat16 holds them as they are."""
        if width not in self._vectors:
            drawn = torch.randn(_VECTORS, width, generator=torch.Generator().manual_seed(width))
            self._vectors[width] = drawn.bfloat16().float()
        return self._vectors[width]


def _as_matrix(weight: Tensor) -> Tensor:
    """Return a parameter as [out, in]: experts below each other, a bias as the weight of a single input."""
    return weight.reshape(-1, weight.shape[-1] if weight.ndim > 1 else 1)


def _measure_lengths(rows: Tensor) -> Tensor:
    """Return the length of each row, in float64 where squares are too large for float32: by infinity all is small."""
    lengths: Tensor = rows.norm(dim=1)
    return lengths if lengths.isfinite().all() else rows.double().norm(dim=1)


def _multiply_difference(x: Tensor, found: Tensor, base: Tensor, wide: Tensor) -> Tensor:
    """Return `x (found - base)^T` [N, out] in float32, with one product; `wide` is the base in float32.

    Where bfloat16 is native, that takes both sides at once and sums in float32, so that nothing but the difference
    itself is rounded: half of the time of widening two weights and multiplying by each.
    """
    if base.dtype == found.dtype == torch.bfloat16 and has_native_bfloat16(base.device):
        return F.linear(torch.cat((x, -x), dim=1).bfloat16(), torch.cat((found, base), dim=1)).float()
    moved = found.float()
    return F.linear(x, moved - wide if moved is found else moved.sub_(wide))


def _respond(change: Change | None, weight: Tensor, x: Tensor) -> Tensor:
    """Return what the adapter adds [N, out] to the products of `weight` with vectors [N, in]."""
    if isinstance(change, LowRank):
        return change.scaling * F.linear(F.linear(x, change.a.float()), change.b.float())
    if isinstance(change, Experts):
        return torch.cat([_respond(part, matrix, x) for part, matrix in zip(change.parts, weight, strict=True)], dim=1)
    changed = weight if change is None else change.apply(weight)
    return F.linear(x, _as_matrix(changed).float() - _as_matrix(weight).float())


def refuse_infinite(name: str, merged: Tensor) -> None:
    """Raise unless a merged tensor is finite.

    Raises:
        ModelError: It isn't.
    """
    if not torch.isfinite(torch.stack(merged.aminmax())).all():  # A NaN is both, at half the time of isfinite.
        raise ModelError(
            f"{name} merged holds NaN or infinity: the update doesn't fit into {merged.dtype}. Nothing was written."
        )
