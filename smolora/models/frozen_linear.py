"""Products with weights that never change, in the layout the CPU's matrix units read fastest.

oneDNN arranges a weight for its kernels at every call; a frozen one can be arranged once, for the forward and for the
backward product. That costs two more copies of the weights. Elsewhere there is one: weights that read the same input
become parts of a joint one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from smolora.runtime.device import has_intel_processor
from smolora.runtime.memory import page_out

_TYPICAL_TOKENS = 512


class FrozenLinear:
    """x -> x W^T + b and its transpose, for one or several weights that read the same input.

    Args:
        weights: `[O_i, D]` each; the outputs lie side by side, `[N, sum O_i]`. Unless they are packed, several keep
            their values as views of the joint weight.
        biases: `[O_i]` each, or None for a layer without.
        packed: Keep both layouts packed, where `is_worth_packing`.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], *, packed: bool) -> None:
        self.sizes = [len(weight) for weight in weights]
        self.num_inputs = weights[0].shape[1]
        weight = torch.cat([w.detach() for w in weights]) if len(weights) > 1 else weights[0].detach()
        self._bias = join_biases(self.sizes, biases, weight)
        self._is_packed = packed and is_worth_packing(weight)
        if self._is_packed:
            self._forward_weight = pack(weight, num_rows=_TYPICAL_TOKENS)
            self._backward_weight = pack(weight.t(), num_rows=_TYPICAL_TOKENS)
        else:
            self._forward_weight, self._backward_weight = weight, weight.t()
        self._copied = list(weights) if self._is_packed else []
        self.page_out_copied()
        if not self._is_packed and len(weights) > 1:
            for original, part in zip(weights, torch.split(weight, self.sizes), strict=True):
                original.data = part

    def page_out_copied(self) -> None:
        """Take the weights out of memory that are held packed beside; whatever reads them brings them back."""
        for original in self._copied:
            page_out(original)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[N, sum O_i]` of `[N, D]`."""
        return self._multiply(x, self._forward_weight, self._bias)

    def backward(self, grad: Tensor) -> Tensor:
        """Return `[N, D]`, the gradient of the input, of `[N, sum O_i]`."""
        return self._multiply(grad, self._backward_weight, None)

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return multiply_by_onednn(x, weight, bias) if self._is_packed else multiply(x, weight, bias)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b, `[N, O]` of `[N, D]` and `[O, D]`, without gradient, by the faster of torch's libraries."""
    if x.dtype == torch.float32 and goes_by_onednn(x):
        return multiply_by_onednn(x, weight, bias)
    return F.linear(x, weight, bias)  # Which gives 16-bit types to oneDNN by itself.


def goes_by_onednn(like: Tensor) -> bool:
    """Whether oneDNN makes products of tensors like this: on a CPU, in 16 bits always, in float32 where it is faster.

    torch's BLAS, MKL, is Intel's. In full float32 it ran at 190 to 225 GFLOP/s where oneDNN ran at 420 to 500 (AMD with
    AVX512), at 165 to 180 where oneDNN ran at 135 to 170 (AMD with AVX2), and at 250 to 290 where oneDNN ran at 240 to
    270 (Intel with AVX512, where a step of pretraining took 1.2 times as long by oneDNN).
    """
    if like.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if like.dtype == torch.float32:
        return torch.backends.cpu.get_cpu_capability().startswith("AVX512") and not has_intel_processor()
    return like.dtype in (torch.bfloat16, torch.float16)


def multiply_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the same by oneDNN, of a weight that may be packed."""
    output: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return output


def is_worth_packing(weight: Tensor) -> bool:
    """Whether a frozen weight is held packed for training: bfloat16 that this CPU computes natively."""
    return weight.dtype == torch.bfloat16 and can_pack(weight)


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN's packed product takes this weight: float32, or bfloat16 computed natively, in CPU memory."""
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    is_native = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return is_native or weight.dtype == torch.float32


def pack(weight: Tensor, *, num_rows: int) -> Tensor:
    """Return a copy of `weight`, `[O, D]`, that only `multiply_by_onednn` can read.

    Its layout depends a little on how many rows a product usually has; any number works.
    """
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), num_rows)
    return packed


def join_biases(sizes: Sequence[int], biases: Sequence[Tensor | None], like: Tensor) -> Tensor | None:
    """Return the biases of layers side by side, zeros for a layer without one; None where no layer has any."""
    if all(bias is None for bias in biases):
        return None
    parts = [like.new_zeros(size) if bias is None else bias.detach() for size, bias in zip(sizes, biases, strict=True)]
    return torch.cat(parts)
