"""Linear layers from packed weights: oneDNN's layout of a matrix, made once, for the many steps of a generation.

torch hands a float32 product on a CPU to a BLAS that lays the matrix out anew each time: 64 rows and a vocabulary of
32,000 took 15 ms a step instead of 3. The copies take as much memory as the weights for as long as the block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_DTYPES = (torch.float32, torch.bfloat16)
_MOST_BYTES = 2**31


@contextmanager
def packed_linears(model: nn.Module, *, num_rows: int) -> Iterator[None]:
    """Let the linear layers of `model` on a CPU compute from packed copies for the block; weights mustn't change in it.

    A model whose copies would take more than 2 GiB stays as it is.

    Args:
        model: Its own weights stay as they are.
        num_rows: How many rows a layer usually gets; oneDNN chooses the layout for them.
    """
    linears = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D) and _can_pack(module)]
    if sum(module.weight.nbytes for module in linears) > _MOST_BYTES:
        linears = []
    try:
        for module in linears:
            weight = module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach()
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), num_rows)
            vars(module)["forward"] = partial(_forward, packed, module.bias)
        yield
    finally:
        for module in linears:
            vars(module).pop("forward", None)


def _can_pack(linear: nn.Linear | Conv1D) -> bool:
    """Whether nothing but a product with a matrix, and perhaps a bias, is computed here."""
    return (
        type(linear) in {nn.Linear, Conv1D}
        and "forward" not in vars(linear)
        and linear.weight.device.type == "cpu"
        and linear.weight.dtype in _DTYPES
    )


def _forward(weight: Tensor, bias: Tensor | None, input: Tensor) -> Tensor:
    output: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return output
