"""Operations between the matrix products, each with a backward pass that keeps only what it needs.

Plain autograd keeps float32 copies of every norm's input and three tensors for each gated activation; here a norm keeps
one number per token beside its input, and an activation nothing but its input.

Legend: `N` tokens, `D` width, `I` width inside the MLP, `H` heads, `K` head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, Self, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

_Made = TypeVar("_Made")

Activation = Literal["silu", "gelu", "gelu_tanh"]

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""By the names of config.json."""


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, offset: float = 0.0) -> Tensor:
    """Return x / rms(x) * (offset + weight) over the last dimension (Zhang & Sennrich 2019), statistics in float32.

    Args:
        x: `[..., D]`.
        weight: `[D]`, frozen.
        eps: Added to the mean square.
        offset: 1 for the families that store weight - 1 (gemma); these multiply before they round, llama after.
    """
    output: Tensor = _RMSNorm.apply(x, weight, eps, offset)  # type: ignore[no-untyped-call]
    return output


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al. 2021) of tokens, `[..., K]`; pairs are (k, k + K / 2)."""

    cos: Tensor
    sin: Tensor
    """Negative in the first half of a head."""

    @classmethod
    def of_angles(cls, cos: Tensor, sin: Tensor) -> Rotary:
        """Return the turns of tokens from cosines and sines `[..., K]`, the two halves of a head alike."""
        half = cos.shape[-1] // 2
        return cls(cos, torch.cat((-sin[..., :half], sin[..., half:]), dim=-1))

    def at(self, tokens: Tensor) -> Rotary:
        """Return the turns of `tokens`, `[...]`, as `[..., K]`."""
        flat = tokens.flatten()
        return Rotary(*(part.index_select(0, flat).view(*tokens.shape, -1) for part in (self.cos, self.sin)))

    def apply(self, heads: Tensor) -> Tensor:
        """Return `[N, H, K]` turned, with gradient, of turns `[N, K]`."""
        output: Tensor = _Turn.apply(heads, Rotary(self.cos[:, None], self.sin[:, None]))  # type: ignore[no-untyped-call]
        return output

    def turn_(self, heads: Tensor, *, back: bool = False) -> Tensor:
        """Turn heads `[..., K]`, or turn them back, in place and without gradient.

        Three passes over whole heads; over halves of 24 numbers it took four times as long.
        """
        swapped = heads.roll(heads.shape[-1] // 2, dims=-1)
        return heads.mul_(self.cos).addcmul_(swapped, self.sin, value=-1 if back else 1)


class MadeOnce(Generic[_Made]):
    """What was made of objects, which are told apart by identity: what all layers of a pass share."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[object, _Made]] = {}

    def of(self, source: object, make: Callable[[], _Made]) -> _Made:
        """Return what `make` gives for `source`, made once."""
        if id(source) not in self._made:
            self._made[id(source)] = (source, make())
        return self._made[id(source)][1]  # Kept beside it, `source` can't give its id to another object.


def gate(gate_up: Tensor, activation: Activation) -> Tensor:
    """Return act(g) * u, `[N, I]`, of `[g, u]` side by side, `[N, 2 * I]` (Shazeer 2020); without gradient."""
    gates, ups = gate_up.chunk(2, dim=-1)
    return _activate(gates, activation).mul_(ups)


def gate_backward(grad: Tensor, gate_up: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Return the gradient of `[g, u]`, `[N, 2 * I]`, from the one of `gate`'s result, and that result once more."""
    gates, ups = gate_up.chunk(2, dim=-1)
    output = torch.empty_like(gate_up)
    grad_gates, grad_ups = output.chunk(2, dim=-1)
    activated = _activate(gates, activation)
    torch.mul(activated, grad, out=grad_ups)
    _activation_backward(grad * ups, gates, activation, out=grad_gates)
    return output, activated.mul_(ups)


@dataclass(frozen=True)
class Kernels:
    """Who computes norms and gates: the functions above, unless a device has better ones of the same signatures."""

    rms_norm: Callable[..., Tensor] = rms_norm
    gate: Callable[[Tensor, Activation], Tensor] = gate
    gate_backward: Callable[[Tensor, Tensor, Activation], tuple[Tensor, Tensor]] = gate_backward


TORCH_KERNELS = Kernels()


@dataclass(frozen=True)
class Dropped:
    """Which numbers of a tensor dropout sets to 0 (Srivastava et al. 2014). Dividing by 1 - p is the caller's."""

    places: Tensor
    """[n] of the flat tensor on a CPU; elsewhere, where counting them would wait for the device, a mask."""

    @classmethod
    def draw(cls, like: Tensor, probability: float) -> Self:
        """Draw each number of a tensor shaped as `like` with `probability`, from torch's generator."""
        if like.device.type != "cpu":
            return cls(torch.rand(like.shape, device=like.device) < probability)
        return cls(_draw_places(like.numel(), probability))

    def zero_(self, x: Tensor) -> Tensor:
        """Set them to 0 in `x`, which is contiguous, in place."""
        if self.places.dtype == torch.bool:
            return x.masked_fill_(self.places, 0)
        x.view(-1).index_fill_(0, self.places, 0)
        return x


def _draw_places(count: int, probability: float) -> Tensor:
    """Return which of `count` numbers are drawn, in order, from the geometric gaps between them (inverse sampling).

    At .05 that takes two fifths of the time of a draw for every number, and setting them to 0 those of a product.
    """
    expected = count * probability
    size = math.ceil(expected + 8 * math.sqrt(expected)) + 8
    while True:
        uniform = torch.rand(size, dtype=torch.float32)  # Below 1, so that a logarithm is finite.
        gaps = uniform.neg_().log1p_().mul_(1 / math.log1p(-probability)).clamp_(max=count).to(torch.int32)
        places = gaps.add_(1).cumsum(0).sub_(1)
        if places[-1] >= count:  # Eight standard deviations more were drawn than are needed.
            return places[: int(torch.searchsorted(places, count))]


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, rotary: Rotary) -> Tensor:
        ctx.rotary = rotary
        return rotary.turn_(heads.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rotary: Rotary = ctx.rotary
        return rotary.turn_(grad.clone(), back=True), None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        wide = x.to(torch.float32, copy=True)  # Mixed types would be copied so at every operation.
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale: Tensor = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, weight, scale)
        ctx.offset = offset
        normed: Tensor = wide.mul_(scale)
        if offset:
            return normed.mul_(weight.float() + offset).to(x.dtype)
        return normed.to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x.to(torch.float32, copy=True).mul_(scale)
        weighted = grad.to(torch.float32, copy=True).mul_(weight.float() + ctx.offset)
        share = torch.linalg.vecdot(weighted, normed).unsqueeze_(-1).div_(-x.shape[-1])
        weighted.addcmul_(normed, share)
        return weighted.mul_(scale).to(x.dtype), None, None, None


def _activate(x: Tensor, activation: Activation) -> Tensor:
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _activation_backward(grad: Tensor, x: Tensor, activation: Activation, *, out: Tensor) -> None:
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=out)
        return
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    torch.ops.aten.gelu_backward.grad_input(grad, x, approximate=approximate, grad_input=out)
