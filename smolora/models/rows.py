"""Rows laid end to end, sorted into groups of like length, so that attention pays neither for padding nor for overlap.

Legend: `N` tokens of the batch, `R` rows of a group, `L` longest row of a group, `H` query heads, `G` key heads,
`P` = H / G queries that read one key, `K` head width.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

from smolora.models.fused_ops import MadeOnce, Rotary

_GROUP_STEP = 32
"""Rows share a group where their lengths round up to the same multiple of this. Padding to the longest of 8 E2E rows
doubled attention's work; a group per row paid its overhead eight times."""

_LENGTH_STEP = 16
"""A group's block is as long as its longest row, rounded up to this: few shapes, for at most 15 tokens a row."""


@dataclass(frozen=True)
class RowGroup:
    """Rows of like length, read as one padded block `[R, L]`."""

    tokens: Tensor
    """[R, L] where the group's tokens lie in the batch; padding repeats the last token of its row."""
    is_padding: Tensor
    """[R, L]"""
    _masks: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict, repr=False)

    @property
    def num_rows(self) -> int:
        """R."""
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """L."""
        return self.tokens.shape[1]

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
class HeadPlaces:
    """Where the heads of a batch lie while attention reads them, so that one gathering brings them all there or back.

    Block after block: of each group of rows its queries `[G, R, P, L]`, its keys `[G, R, 1, L]`, and its values.
    """

    heads: Tensor
    """For every place the head of the batch, of `[N, heads]`, that it holds; padding holds one of its row."""
    places: Tensor
    """For every head of a token of a row its place."""
    padding: Tensor
    """The places of padding."""
    shapes: Sequence[Sequence[tuple[int, int, int, int]]]
    """Of each group the shapes of its blocks."""

    @classmethod
    def build(cls, groups: Sequence[RowGroup], kinds: Sequence[Tensor]) -> Self:
        """Return the places of the heads of `groups`.

        Args:
            groups: Rows that hold every token once.
            kinds: The numbers of the heads that lie together, `[G, 1, P, 1]` each, all of a token's heads.
        """
        num_heads = sum(kind.numel() for kind in kinds)
        heads, is_padding, shapes = [], [], []
        for group in groups:
            blocks = [(group.tokens * num_heads)[:, None] + kind for kind in kinds]
            heads += [block.flatten() for block in blocks]
            is_padding += [group.is_padding[:, None].expand(block.shape).flatten() for block in blocks]
            shapes.append([(len(block), group.num_rows, block.shape[2], group.length) for block in blocks])
        held, is_filled = torch.cat(heads), torch.cat(is_padding).logical_not()
        real = is_filled.nonzero().flatten()
        places = held.new_empty(len(real)).scatter_(0, held[real], real)
        return cls(held, places, is_filled.logical_not().nonzero().flatten(), shapes)

    def split(self, flat: Tensor) -> Iterator[list[Tensor]]:
        """Yield the blocks of each group, views `[G * R, P, L, K]` of `flat`, `[places, K]`."""
        start = 0
        for shapes in self.shapes:
            blocks = []
            for shape in shapes:
                end = start + math.prod(shape)
                blocks.append(flat[start:end].view(shape[0] * shape[1], *shape[2:], flat.shape[1]))
                start = end
            yield blocks


@dataclass(frozen=True)
class Rows:
    """The lengths of the rows of one packed batch, in their order."""

    lengths: Sequence[int]
    """Tokens of each row. What the batch has behind them is filler: it attends to nothing, and nothing to it."""
    device: torch.device
    _rotary: MadeOnce[Rotary] = field(default_factory=MadeOnce, repr=False, compare=False)
    _turns: MadeOnce[list[Rotary]] = field(default_factory=MadeOnce, repr=False, compare=False)
    _head_places: dict[tuple[int, int], HeadPlaces] = field(default_factory=dict, repr=False)
    _query_places: dict[tuple[int, int], HeadPlaces] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        assert all(self.lengths), "a row has tokens"

    def rotary(self, cos: Tensor, sin: Tensor) -> Rotary:
        """Return the turns of one forward pass's angles `[1, N, K]`, made once for all of its layers."""
        return self._rotary.of(cos, lambda: Rotary.of_angles(cos[0], sin[0]))

    def turns(self, rotary: Rotary) -> list[Rotary]:
        """Return the turns `[R, 1, L, K]` of each group, made once for all layers."""
        return self._turns.of(rotary, lambda: [rotary.at(group.tokens[:, None]) for group in self.groups])

    def head_places(self, num_heads: int, num_shared: int) -> HeadPlaces:
        """Return the places of queries, keys and values, `[N, H + 2 * G]`, made once for all layers."""
        key = (num_heads, num_shared)
        if key not in self._head_places:
            numbers = torch.arange(num_heads + 2 * num_shared, device=self.device)
            kinds = torch.split(numbers, [num_heads, num_shared, num_shared])
            self._head_places[key] = HeadPlaces.build(self.groups, [kind.view(num_shared, 1, -1, 1) for kind in kinds])
        return self._head_places[key]

    def query_places(self, num_heads: int, num_shared: int) -> HeadPlaces:
        """Return the places of queries alone, `[N, H]`, or of what they read, made once for all layers."""
        key = (num_heads, num_shared)
        if key not in self._query_places:
            numbers = torch.arange(num_heads, device=self.device)
            self._query_places[key] = HeadPlaces.build(self.groups, [numbers.view(num_shared, 1, -1, 1)])
        return self._query_places[key]

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
        starts, lengths = torch.tensor(rows, device=self.device).T[..., None]  # [R, 1] each
        offsets = torch.arange(longest, device=self.device)
        return RowGroup(starts + torch.minimum(offsets, lengths - 1), offsets >= lengths)


def round_up(number: int, step: int) -> int:
    """Return the lowest multiple of `step` that is at least `number`."""
    return -(-number // step) * step
