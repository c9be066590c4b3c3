"""Operations between the matrix products, each with a backward pass that keeps only what it needs.

Plain autograd keeps float32 copies of every norm's input and three tensors for each gated activation; here a norm keeps
one number per token beside its input, and an activation nothing but its input.

Legend: `N` tokens, `D` width, `I` width inside the MLP, `H` heads, `K` head width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["silu", "gelu", "gelu_tanh"]


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


def rotate_heads(heads: Tensor, cos: Tensor, sin: Tensor, *, num_rotated: int) -> Tensor:
    """Return `[N, H, K]` whose first `num_rotated` heads are turned by rotary positions; without gradient.

    Pairs are (k, k + K / 2), as llama has them; cos and sin are `[N, K]`. A negated sine turns back.
    """
    half = heads.shape[-1] // 2
    cos, sin = cos[:, None, :half], sin[:, None, :half]
    output = heads.clone(memory_format=torch.contiguous_format)
    first, second = heads[:, :num_rotated, :half], heads[:, :num_rotated, half:]
    torch.mul(first, cos, out=output[:, :num_rotated, :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=output[:, :num_rotated, half:]).addcmul_(first, sin)
    return output


def gate(gate_up: Tensor, activation: Activation) -> Tensor:
    """Return act(g) * u, `[N, I]`, of `[g, u]` side by side, `[N, 2 * I]` (Shazeer 2020)."""
    output: Tensor = _Gate.apply(gate_up, activation)  # type: ignore[no-untyped-call]
    return output


def draw_keep_mask(like: Tensor, probability: float) -> Tensor:
    """Return a boolean tensor shaped as `like`, True with 1 - `probability`, from torch's generator.

    Compares random 16-bit numbers, four to a draw: a sixth of the time of `bernoulli_` on a CPU. The probability is met
    to 1 / 65,536.
    """
    if like.device.type != "cpu":
        return torch.rand(like.shape, device=like.device) >= probability
    count = like.numel()
    draws = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    numbers = draws.view(torch.int16)[:count].view(like.shape)
    return numbers >= round(probability * 65_536) - 32_768


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale: Tensor = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, weight, scale)
        ctx.offset = offset
        if offset:
            normed: Tensor = (x * scale).mul_(weight.float() + offset)
            return normed.to(x.dtype)
        return torch.mul(x, scale, out=torch.empty_like(x)).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale  # float32
        weighted = grad.float() * (weight.float() + ctx.offset)
        share = torch.linalg.vecdot(weighted, normed).unsqueeze_(-1).div_(-x.shape[-1])
        weighted.addcmul_(normed, share)
        return torch.mul(weighted, scale, out=torch.empty_like(x)), None, None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        gates, ups = gate_up.chunk(2, dim=-1)
        return _activate(gates, activation).mul_(ups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        activation: Activation = ctx.activation
        gates, ups = gate_up.chunk(2, dim=-1)
        output = torch.empty_like(gate_up)
        grad_gates, grad_ups = output.chunk(2, dim=-1)
        torch.mul(_activate(gates, activation), grad, out=grad_ups)
        _activation_backward(grad * ups, gates, activation, out=grad_gates)
        return output, None


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
