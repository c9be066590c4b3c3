"""Linear layers from packed weights: oneDNN's layout of a matrix, made once, for the many steps of a generation.

torch hands a float32 product on a CPU to a BLAS that lays the matrix out anew each time: 64 rows and a vocabulary of
32,000 took 15 ms a step instead of 3. The copies take as much memory as the weights for as long as the block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import nn
from transformers.pytorch_utils import Conv1D

from smolora.models.frozen_linear import can_pack, multiply_by_onednn, pack
from smolora.models.structure import has_plain_forward, is_stored_transposed, replaced_forward

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
    with ExitStack() as stack:
        for module in linears:
            weight = module.weight.detach()
            packed = pack(weight.t() if is_stored_transposed(module) else weight, num_rows=num_rows)
            stack.enter_context(replaced_forward(module, partial(multiply_by_onednn, weight=packed, bias=module.bias)))
        yield


def _can_pack(linear: nn.Linear | Conv1D) -> bool:
    """Whether nothing but a product with a matrix, and perhaps a bias, is computed here."""
    return has_plain_forward(linear) and "forward" not in vars(linear) and can_pack(linear.weight)
