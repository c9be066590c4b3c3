"""A model's head in a decode: logits where somebody reads them, and the highest of each row without the others.

A greedy step takes one of 32,000 logits, and a product in bfloat16 takes half of the time of one in float32. It is off
by no more than a known part, so few tokens may have the highest logit, and theirs are computed again in float32.

`N` rows, `D` width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from smolora.generation.choosing import Highest, find_highest
from smolora.generation.slots import FEWEST_ROWS
from smolora.generation.step import is_filling
from smolora.models.frozen_linear import can_pack, multiply_by_onednn, pack
from smolora.runtime.device import has_native_bfloat16

_FEWEST_TOKENS = 8192
"""All logits of fewer tokens take no longer than looking for the highest."""

_PART = 256
"""Logits that share a bound, which the longest weight among them gives."""

_FIRST_STEPS = 16
"""Steps of fewer than `FEWEST_ROWS` rows without a copy of the matrix, which costs what so many steps save by it."""

_MOST = 16
"""Logits of a row computed again, in the mean. Where more may be the highest, all are computed."""

_ROUNDING = 2.0**-8
"""How far at most a number moves to bfloat16, with its 8 significant bits, as a part of itself."""


class Head:
    """What stands for the forward of a head, a matrix `[V, D]` without a bias.

    Args:
        weight: Its matrix.
        build_product: Returns what gives the logits `[..., V]` of hidden states `[..., D]`, called once and only where
            they are asked for; left out, a product with the matrix as it is.
        num_rows: How many rows it usually gets.
        most_bytes: What a copy of the matrix may take.
    """

    def __init__(
        self,
        weight: Tensor,
        build_product: Callable[[], Callable[[Tensor], Tensor]] | None = None,
        *,
        num_rows: int,
        most_bytes: int,
    ) -> None:
        self._weight, self._build_product = weight.detach(), build_product
        self._num_rows, self._most_bytes = num_rows, most_bytes
        self._kept: list[Tensor] | None = None
        self._given: Tensor | None = None
        self._is_last: bool | None = None
        self._num_products = 0

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return logits, without numbers where nobody reads them: of prompts, and while hidden states are kept."""
        if self._kept is not None:
            self._kept.append(hidden)
        if self._kept is not None or is_filling():
            return hidden.new_empty(*hidden.shape[:-1], len(self._weight))
        self._num_products += 1
        if self._is_last is not None or not self._is_worth_it:
            return self._product(hidden)
        logits = F.linear(hidden, self._weight)  # Whoever screens needs no other product.
        self._given = logits.clone()
        return logits

    @cached_property
    def _product(self) -> Callable[[Tensor], Tensor]:
        return self._build_product() if self._build_product else partial(F.linear, weight=self._weight)

    @contextmanager
    def keeping_hidden(self) -> Iterator[list[Tensor]]:
        """Compute no logits in the block, and yield what hidden states come to: there, for `screen`."""
        self._kept = []
        try:
            yield self._kept
        finally:
            self._kept = None

    def learn_whether_last(self, output: Tensor) -> None:
        """See by a step's logits whether the model changes those of its head: gemma2 caps them, others hide some."""
        if self._given is not None:
            self._is_last, self._given = torch.equal(output, self._given), None

    @property
    def can_screen(self) -> bool:
        """Whether `screen` finds what the model's own logits would say, in less time."""
        has_begun = self._num_rows >= FEWEST_ROWS or self._num_products >= _FIRST_STEPS
        return has_begun and bool(self._is_last)

    @cached_property
    def _is_worth_it(self) -> bool:
        if self._weight.dtype != torch.float32 or len(self._weight) < _FEWEST_TOKENS:
            return False
        is_small = self._weight.nbytes // 2 <= self._most_bytes
        return is_small and can_pack(self._weight) and has_native_bfloat16(self._weight.device)

    def screen(self, hidden: Tensor) -> Highest:
        """Return the highest logit of each row of hidden states `[N, D]`, and its token; none is finite for NaN.

        Rounded weights and states are each off by `_ROUNDING` of their lengths, and their product, which is rounded
        once more, by as much and by what D sums lose (Higham 2002, sections 2.2 and 3.1).
        """
        part = 3.02 * _ROUNDING + hidden.shape[1] * torch.finfo(torch.float32).eps
        bounds = _measure_lengths(hidden)[:, None] * self._longest * part  # [N, parts]
        rough = multiply_by_onednn(hidden.to(torch.bfloat16), self._rough_weight, None).view(*bounds.shape, _PART)
        highest = rough.amax(-1).float()
        lowest = (highest - bounds).amax(-1, keepdim=True)  # The highest logit is no lower.
        rows, parts = (highest + bounds >= lowest).nonzero(as_tuple=True)
        near = rough[rows, parts] >= (lowest - bounds)[rows, parts, None]
        found, places = near.nonzero(as_tuple=True)
        if len(found) > _MOST * len(hidden):
            return find_highest(F.linear(hidden, self._weight))
        rows, tokens = rows[found], (parts[found] * _PART + places).clamp_(max=len(self._weight) - 1)
        logits = (hidden[rows] * self._weight[tokens]).sum(-1)
        counts = rows.bincount(minlength=len(hidden))
        starts = counts.cumsum(0) - counts
        table = logits.new_full((len(hidden), int(counts.max()) + 1), -torch.inf)
        table[rows, torch.arange(len(rows)) - starts[rows]] = logits
        best, places = table.max(-1)
        return Highest(best, torch.cat((tokens, tokens.new_zeros(1)))[starts + places])

    @cached_property
    def _rough_weight(self) -> Tensor:
        """The matrix in bfloat16, its last row repeated to whole parts: of equal logits the first is taken."""
        rough = self._weight.to(torch.bfloat16)
        missing = -len(rough) % _PART
        return pack(torch.cat((rough, rough[-1:].expand(missing, -1))), num_rows=self._num_rows)

    @cached_property
    def _longest(self) -> Tensor:
        """[parts], the length of the longest row of the matrix in each part."""
        lengths = _measure_lengths(self._weight)
        return F.pad(lengths, (0, -len(lengths) % _PART)).view(-1, _PART).amax(-1)


def _measure_lengths(rows: Tensor) -> Tensor:
    """Return the length of each row, which squares too small for float32 don't make 0."""
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return lengths.clamp_(min=1e-16)
