"""Linear layers that train, with all three products of a step by oneDNN.

Legend: `N` tokens, `D` input width, `O` outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from smolora.models.frozen_linear import multiply_by_onednn
from smolora.models.structure import has_plain_forward, replaced_forward


@contextmanager
def linears_by_onednn(model: nn.Module) -> Iterator[int]:
    """Let the float32 linear layers of `model` on a CPU multiply by oneDNN inside the block; yields how many do.

    Names and weights stay what they are; results change by rounding. It pays where `goes_by_onednn` says so.
    """
    linears = [module for module in model.modules() if isinstance(module, nn.Linear) and _can_be_replaced(module)]
    with ExitStack() as stack:
        for linear in linears:
            stack.enter_context(replaced_forward(linear, partial(_forward, linear)))
        yield len(linears)


def _can_be_replaced(linear: nn.Linear) -> bool:
    weight = linear.weight
    return has_plain_forward(linear) and weight.dtype == torch.float32 and weight.device.type == "cpu"


def _forward(linear: nn.Linear, input: Tensor) -> Tensor:
    output: Tensor = _Product.apply(input.flatten(0, -2), linear.weight, linear.bias)  # type: ignore[no-untyped-call]
    return output.view(*input.shape[:-1], -1)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return multiply_by_onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            multiply_by_onednn(grad, weight.t(), None) if needs_x else None,
            multiply_by_onednn(grad.t(), x.t(), None) if needs_weight else None,  # [O, N] by [D, N]: grad^T x.
            grad.sum(0) if needs_bias else None,
        )
