"""Products with weights that never change, in the layout the CPU's matrix units read fastest.

oneDNN arranges a weight for its kernels at every call; a frozen one can be arranged once, for the forward and for the
backward product. That costs two more copies of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_TYPICAL_TOKENS = 512
"""oneDNN's layout depends a little on the number of tokens; any number works."""


class FrozenLinear:
    """x -> x W^T + b and its transpose, for one or several weights that read the same input.

    Args:
        weights: `[O_i, D]` each; the outputs lie side by side, `[N, sum O_i]`.
        biases: `[O_i]` each, or None for a layer without.
        packed: Keep both layouts packed, where `can_pack` allows it.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], *, packed: bool) -> None:
        self.sizes = [len(weight) for weight in weights]
        self.device, self.dtype = weights[0].device, weights[0].dtype
        self.num_inputs = weights[0].shape[1]
        weight = torch.cat([w.detach() for w in weights]) if len(weights) > 1 else weights[0].detach()
        self._bias = _join_biases(self.sizes, biases, weight)
        self._is_packed = packed and can_pack(weight)
        if self._is_packed:
            self._forward_weight = _pack(weight)
            self._backward_weight = _pack(weight.t())
        else:
            self._forward_weight, self._backward_weight = weight, weight.t()

    def forward(self, x: Tensor) -> Tensor:
        """Return `[N, sum O_i]` of `[N, D]`."""
        return self._multiply(x, self._forward_weight, self._bias)

    def backward(self, grad: Tensor) -> Tensor:
        """Return `[N, D]`, the gradient of the input, of `[N, sum O_i]`."""
        return self._multiply(grad, self._backward_weight, None)

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self._is_packed:
            output: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
            return output
        return F.linear(x, weight, bias)


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN's packed product takes this weight: bfloat16 in CPU memory, computed natively."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch._C._has_mkldnn
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _TYPICAL_TOKENS)
    return packed


def _join_biases(sizes: Sequence[int], biases: Sequence[Tensor | None], like: Tensor) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    parts = [like.new_zeros(size) if bias is None else bias.detach() for size, bias in zip(sizes, biases, strict=True)]
    return torch.cat(parts)
