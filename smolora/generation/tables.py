"""Products of a few queries a row with many keys, from keys and values that lie as rows of a table.

torch's batched product of one query with many keys reads them at a third of the speed that memory has (MKL on an AMD
EPYC: 14 of 41 GB/s), and its attention kernel in 16 bits without matrix units at a tenth. The kernels of sparse
products and of embedding bags read rows of a table one after the other.

`B` rows, `G` heads of keys, `Q` queries that share one, `L` keys read, `K` width.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

_FEW = 6
"""Queries of one head of keys. More are faster by a product that reads a key once for all of them: 64 rows of 140 keys
took .76, 1.2 and 2.3 ms with 3, 6 and 12 queries, by products 1.3, 1.4 and 1.7."""


@dataclass(frozen=True)
class Lookups:
    """Which rows of a table each query reads: [B, G, Q] queries, L rows for each."""

    shape: tuple[int, int, int, int]
    """B, G, Q, L."""

    products: Tensor
    """[B * G * Q, rows of the table], sparse: those that are asked for.

    A layer's take the place of the last one's, which have to be finite: 0 times NaN is added to them."""

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, num_queries: int) -> Lookups | None:
        """Return those of keys and values [B, G, L, K] that are parts of larger tables, None where they aren't."""
        B, G, L, K = keys.shape
        capacity = keys.stride(1) // K
        for part, width in ((keys, K), (values, values.shape[3])):
            if part.stride() != (G * capacity * width, capacity * width, width, 1):
                return None
        heads = torch.arange(0, B * G * capacity, capacity, dtype=torch.int32)
        rows = heads.repeat_interleave(num_queries)[:, None] + torch.arange(L, dtype=torch.int32)
        starts = torch.arange(0, rows.numel() + 1, L, dtype=torch.int32)
        size = len(rows), (B * G - 1) * capacity + L
        _be_told_of_beta()
        none = torch.zeros(rows.numel())
        products = torch.sparse_csr_tensor(starts, rows.flatten(), none, size, check_invariants=False)
        return cls((B, G, num_queries, L), products)

    def score(self, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
        """Return the products [B, G, Q, L] of queries [B, G, Q, K] with keys [B, G, L, K], all float32.

        They last until the next are asked for.
        """
        flat, table = queries.reshape(-1, queries.shape[-1]), self._table(keys)
        torch.sparse.sampled_addmm(self.products, flat, table.t(), beta=0.0, alpha=scale, out=self.products)
        return self.products.values().view(self.shape)

    def mix(self, weights: Tensor, values: Tensor) -> Tensor:
        """Return the sums [B, G, Q, K] of values [B, G, L, K] by weights [B, G, Q, L] of their type."""
        rows, starts = self.products.col_indices(), self.products.crow_indices()[:-1]
        flat = weights.reshape(-1)
        mixed = F.embedding_bag(rows, self._table(values), starts, mode="sum", per_sample_weights=flat)
        return mixed.view(*self.shape[:3], -1)

    def _table(self, part: Tensor) -> Tensor:
        """Return the table [rows, K] that `part` [B, G, L, K] is of."""
        return part.as_strided((self.products.shape[1], part.shape[-1]), (part.shape[-1], 1))


def are_few(num_queries: int) -> bool:
    """Whether lookups for this many queries of a head of keys take less time than a product."""
    return num_queries <= _FEW


@cache
def _be_told_of_beta() -> None:
    """Hear, in silence, what torch says once in a process: that sparse tensors of this kind are in beta."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        torch.sparse_csr_tensor([0], [], [], (0, 0), check_invariants=False)
