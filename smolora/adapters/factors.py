"""What an adapter's tensors are multiplied with, for every method: which can't move yet, and which are 1 at rest.

What an adapter adds is a product: B A of LoRA, P diag(e) Q of AdaLoRA, two vectors of VeRA. The gradient of a factor is
exactly zero as long as another factor of the same module is zero everywhere, as one of them is at the start.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor

_PRODUCTS = (
    ("lora_A", "lora_B", "lora_E"),
    ("lora_embedding_A", "lora_embedding_B"),
    ("vera_lambda_b", "vera_lambda_d"),
)
"""Factors that are multiplied, by the segment that peft puts into a parameter's name."""

_PRODUCT_OF = {factor: number for number, product in enumerate(_PRODUCTS) for factor in product}


_RESCALES = "ia3_l"
"""The segment of tensors that multiply what the base computes, so that 1, and not 0, changes nothing."""


def rescales(name: str) -> bool:
    """Whether a parameter multiplies what the base computes, as IA3's vectors do, stored as [n, 1] or [1, n]."""
    return _RESCALES in name.split(".")


def find_waiting(parameters: Mapping[str, Tensor]) -> set[str]:
    """Return the tensors whose gradient is exactly zero, since another factor of their product is zero everywhere.

    Args:
        parameters: All tensors of the adapter, by the names they have in the model.
    """
    products: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name in parameters:
        for segment in name.split("."):
            if segment in _PRODUCT_OF:
                products[name.partition(f".{segment}.")[0], _PRODUCT_OF[segment]].append(name)
    waiting: set[str] = set()
    for names in products.values():
        zero = [name for name in names if not parameters[name].any()]
        waiting |= {name for name in names if set(zero) - {name}}
    return waiting
