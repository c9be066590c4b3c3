"""Products of a few queries a row with many keys, from keys and values that lie as rows of a table.

torch's batched product of one query with many keys reads them at a third of the speed that memory has (MKL on an AMD
EPYC: 14 of 41 GB/s), and its attention kernel in 16 bits without matrix units at a tenth. The kernels of sparse
products and of embedding bags read rows of a table one after the other.

`B` rows, `G` heads of keys, `Q` queries that share one, `L` keys read, `K` width.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

_FEW = 6
"""Queries of one head of keys. More are faster by a product that reads a key once for all of them: 64 rows of 140 keys
took .76, 1.2 and 2.3 ms with 3, 6 and 12 queries, by products 1.3, 1.4 and 1.7."""

_LOWEST = torch.finfo(torch.float32).min

_MOST_SEEN = 0.875
"""Of the keys in reach. Where more are in sight, all are read: their scores lie as the softmax takes them."""


@dataclass(frozen=True)
class Lookups:
    """Which rows of a table each of [B, G, Q] queries reads, n in all."""

    shape: tuple[int, int, int, int]
    """B, G, Q, L."""

    products: Tensor
    """[B * G * Q, rows of the table], sparse: those that are asked for.

    A layer's take the place of the last one's, which have to be finite: 0 times NaN is added to them."""

    places: Tensor | None = None
    """[n], which of the keys [B, G, Q, L] are read; None for all."""

    hidden: Tensor | None = None
    """[B, 1, Q, L], which of the keys that are read weigh nothing; None for none."""

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, num_queries: int, seen: Tensor | None = None) -> Lookups | None:
        """Return those of keys and values [B, G, L, K] that are parts of larger tables, None where they aren't.

        `seen` [B, 1, Q, L] is True for the keys of its own row that a query may look up, one at least; None for all.
        """
        B, G, L, K = keys.shape
        capacity = keys.stride(1) // K
        for part, width in ((keys, K), (values, values.shape[3])):
            if part.stride() != (G * capacity * width, capacity * width, width, 1):
                return None
        shape = B, G, num_queries, L
        if max(math.prod(shape), B * G * capacity) > torch.iinfo(torch.int32).max:
            return None
        heads = torch.arange(0, B * G * capacity, capacity, dtype=torch.int32).view(B, G, 1, 1)
        rows = (heads + torch.arange(L, dtype=torch.int32)).expand(shape)
        starts = torch.arange(0, rows.numel() + 1, L, dtype=torch.int32)
        places = hidden = None
        if seen is not None and seen.sum() < _MOST_SEEN * seen.numel():
            wide = seen.expand(shape)
            places = wide.flatten().nonzero()[:, 0]
            starts = F.pad(wide.sum(-1).flatten().cumsum(0), (1, 0)).int()
        elif seen is not None and not seen.all():
            hidden = ~seen
        read = rows.flatten() if places is None else rows.take(places)
        return cls(shape, _ask(starts, read, (B * G - 1) * capacity + L), places, hidden)

    def score(self, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
        """Return the products [n] of queries [B, G, Q, K] with the keys [B, G, L, K] they read, all float32.

        They last until the next are asked for.
        """
        flat, table = queries.reshape(-1, queries.shape[-1]), self._table(keys)
        torch.sparse.sampled_addmm(self.products, flat, table.t(), beta=0.0, alpha=scale, out=self.products)
        return self.products.values()

    def softmax(self, scores: Tensor) -> Tensor:
        """Return the weights [n] of scores [n], which sum to 1 for each query."""
        if self.places is not None:
            return self._padded.put_(self.places, scores).softmax(-1).take(self.places)
        padded = scores.view(self.shape)
        return (padded if self.hidden is None else padded.masked_fill(self.hidden, _LOWEST)).softmax(-1).flatten()

    def mix(self, weights: Tensor, values: Tensor) -> Tensor:
        """Return the sums [B, G, Q, K] of values [B, G, L, K] by weights [n] of their type."""
        rows, starts = self._bags
        mixed = F.embedding_bag(rows, self._table(values), starts, mode="sum", per_sample_weights=weights)
        return mixed.view(*self.shape[:3], -1)

    @cached_property
    def _padded(self) -> Tensor:
        """[B, G, Q, L], scores of a layer in their places, and between them what weighs nothing in any layer."""
        return torch.full(self.shape, _LOWEST, dtype=torch.float32)

    @cached_property
    def _bags(self) -> tuple[Tensor, Tensor]:
        """[n], the rows of the table that are read, and [B * G * Q], where each query's begin."""
        return self.products.col_indices(), self.products.crow_indices()[:-1]

    def _table(self, part: Tensor) -> Tensor:
        """Return the table [rows, K] that `part` [B, G, L, K] is of."""
        return part.as_strided((self.products.shape[1], part.shape[-1]), (part.shape[-1], 1))


def are_few(num_queries: int) -> bool:
    """Whether lookups for this many queries of a head of keys take less time than a product."""
    return num_queries <= _FEW


def _ask(starts: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Return the sparse products of queries with the rows of a table that lie between their start and the next."""
    _be_told_of_beta()
    none = torch.zeros(len(rows), dtype=torch.float32)
    return torch.sparse_csr_tensor(starts, rows, none, (len(starts) - 1, num_rows), check_invariants=False)


@cache
def _be_told_of_beta() -> None:
    """Hear, in silence, what torch says once in a process: that sparse tensors of this kind are in beta."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        torch.sparse_csr_tensor([0], [], [], (0, 0), check_invariants=False)
