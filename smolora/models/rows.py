"""Rows laid end to end, sorted into groups of like length, so that attention pays neither for padding nor for overlap.

Legend: `N` tokens of the batch, `R` rows of a group, `L` longest row of a group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from smolora.models.fused_ops import Rotary

_GROUP_STEP = 32
"""Rows share a group where their lengths round up to the same multiple of this. Padding to the longest of 8 E2E rows
doubled attention's work; a group per row paid its overhead eight times."""

_LENGTH_STEP = 16
"""A group's block is as long as its longest row, rounded up to this: few shapes, for at most 15 tokens a row."""


@dataclass(frozen=True)
class RowGroup:
    """Rows of like length, read as one padded block `[R, L]`."""

    num_rows: int
    length: int
    source: Tensor
    """[n] flat positions of the group's tokens in the batch."""
    place: Tensor | None
    """[n] their flat positions in the padded block; None where no row is padded."""
    _masks: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict, repr=False)

    def pad(self, tokens: Tensor) -> Tensor:
        """Return `[R, L, ...]`, zero on padding, of tokens `[N, ...]`."""
        chosen = tokens.index_select(0, self.source)
        if self.place is not None:
            block = tokens.new_zeros(self.num_rows * self.length, *tokens.shape[1:])
            chosen = block.index_copy_(0, self.place, chosen)
        return chosen.view(self.num_rows, self.length, *tokens.shape[1:])

    def unpad(self, block: Tensor, into: Tensor) -> None:
        """Write the real tokens of `[R, L, ...]` to their places in `[N, ...]`."""
        flat = block.reshape(self.num_rows * self.length, *block.shape[2:])
        into.index_copy_(0, self.source, flat if self.place is None else flat.index_select(0, self.place))

    def causal_mask(self, window: int | None, like: Tensor) -> Tensor:
        """Return `[L, L]`: 0 where a token sees another, -inf elsewhere. Padding lies behind every real token."""
        key = (window, like.dtype)
        if key not in self._masks:
            is_hidden = torch.ones(self.length, self.length, dtype=torch.bool, device=like.device).triu_(1)
            if window is not None:
                is_hidden |= torch.ones_like(is_hidden).tril_(-window)
            self._masks[key] = like.new_zeros(self.length, self.length).masked_fill_(is_hidden, float("-inf"))
        return self._masks[key]


@dataclass(frozen=True)
class Rows:
    """The lengths of the rows of one packed batch, in their order."""

    lengths: Sequence[int]
    """Tokens of each row. What the batch has behind them is filler: it attends to nothing, and nothing to it."""
    device: torch.device
    _rotary: dict[tuple[int, int, int], tuple[Tensor, Rotary]] = field(default_factory=dict, repr=False)

    def rotary(self, cos: Tensor, sin: Tensor, *, num_rotated: int, num_heads: int) -> Rotary:
        """Return `Rotary.spread` of one forward pass's angles `[1, N, K]`, made once for all of its layers."""
        key = (id(cos), num_rotated, num_heads)
        if key not in self._rotary:
            self._rotary[key] = (cos, Rotary.spread(cos[0], sin[0], num_rotated=num_rotated, num_heads=num_heads))
        return self._rotary[key][1]  # Kept beside it, `cos` can't give its id to another tensor.

    @cached_property
    def boundaries(self) -> Tensor:
        """[rows + 1] int32: where each row begins, and where the last one ends."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.device)

    @cached_property
    def groups(self) -> list[RowGroup]:
        """The rows by like length."""
        members: dict[int, list[tuple[int, int]]] = defaultdict(list)
        start = 0
        for length in self.lengths:
            members[-(-length // _GROUP_STEP)].append((start, length))
            start += length
        return [self._build_group(rows) for rows in members.values()]

    def _build_group(self, rows: Sequence[tuple[int, int]]) -> RowGroup:
        longest = round_up(max(length for _, length in rows), _LENGTH_STEP)
        source = [torch.arange(start, start + length) for start, length in rows]
        place = [torch.arange(number * longest, number * longest + length) for number, (_, length) in enumerate(rows)]
        is_padded = any(length != longest for _, length in rows)
        return RowGroup(
            len(rows),
            longest,
            torch.cat(source).to(self.device),
            torch.cat(place).to(self.device) if is_padded else None,
        )


def round_up(number: int, step: int) -> int:
    """Return the lowest multiple of `step` that is at least `number`."""
    return -(-number // step) * step
