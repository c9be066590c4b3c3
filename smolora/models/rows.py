"""Rows laid end to end, sorted into groups of like length, so that attention pays neither for padding nor for overlap.

Legend: `N` tokens of the batch, `R` rows of a group, `L` longest row of a group, `H` query heads, `G` key heads,
`K` head width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Self

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

    tokens: Tensor
    """[R, L] where the group's tokens lie in the batch; padding repeats the last token of its row."""
    is_padding: Tensor
    """[R, L]"""
    _masks: dict[tuple[int | None, int, torch.dtype], Tensor] = field(default_factory=dict, repr=False)

    @property
    def num_rows(self) -> int:
        """R."""
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """L."""
        return self.tokens.shape[1]

    def causal_mask(self, window: int | None, copies: int, like: Tensor) -> Tensor:
        """Return `[copies, L, L]`: 0 where a token sees another, else -inf. Padding lies behind every real token."""
        key = (window, copies, like.dtype)
        if key not in self._masks:
            is_hidden = torch.ones(self.length, self.length, dtype=torch.bool, device=like.device).triu_(1)
            if window is not None:
                is_hidden |= torch.ones_like(is_hidden).tril_(-window)
            mask = like.new_zeros(self.length, self.length).masked_fill_(is_hidden, float("-inf"))
            self._masks[key] = mask.repeat(copies, 1, 1)
        return self._masks[key]


@dataclass(frozen=True)
class HeadPlaces:
    """Where the heads of a batch lie while attention reads them, so that one gathering brings them all there or back.

    Block after block: of each group of rows its queries `[G, R, H / G, L]`, its keys `[G, R, L]` and its values.
    """

    heads: Tensor
    """For every place the head of the batch, of `[N, H + 2 * G]`, that it holds; padding holds one of its row."""
    places: Tensor
    """For every head of a token of a row its place."""
    is_padding: Tensor
    """The places of padding."""

    @classmethod
    def build(cls, groups: Sequence[RowGroup], num_tokens: int, *, per_key: int, num_keys: int, has_keys: bool) -> Self:
        """Return the places of `num_tokens` tokens in rows.

        Args:
            groups: The rows.
            num_tokens: Of all rows.
            per_key: H / G.
            num_keys: G.
            has_keys: Whether there are keys and values; else the heads are queries alone, `[N, H]`.
        """
        num_queries = per_key * num_keys
        device = groups[0].tokens.device
        queries = torch.arange(num_queries, device=device).view(num_keys, 1, per_key, 1)
        keys = torch.arange(num_queries, num_queries + num_keys, device=device)[:, None, None]
        num_heads = num_queries + (2 * num_keys if has_keys else 0)
        heads, is_padding = [], []
        for group in groups:
            firsts, padding = group.tokens * num_heads, group.is_padding
            heads.append((firsts[:, None] + queries).flatten())
            is_padding.append(padding[:, None].expand(num_keys, -1, per_key, -1).flatten())
            if has_keys:
                heads += [(firsts + keys).flatten(), (firsts + keys + num_keys).flatten()]
                is_padding += 2 * [padding.expand(num_keys, -1, -1).flatten()]
        held, pads = torch.cat(heads), torch.cat(is_padding)
        real = pads.logical_not().nonzero().flatten()
        places = held.new_empty(num_tokens * num_heads).scatter_(0, held[real], real)
        return cls(held, places, pads.nonzero().flatten())


@dataclass(frozen=True)
class Rows:
    """The lengths of the rows of one packed batch, in their order."""

    lengths: Sequence[int]
    """Tokens of each row. What the batch has behind them is filler: it attends to nothing, and nothing to it."""
    device: torch.device
    _rotary: dict[int, tuple[Tensor, Rotary]] = field(default_factory=dict, repr=False)
    _turns: dict[int, tuple[Rotary, list[Rotary]]] = field(default_factory=dict, repr=False)
    _places: dict[tuple[int, int, bool], HeadPlaces] = field(default_factory=dict, repr=False)

    def rotary(self, cos: Tensor, sin: Tensor) -> Rotary:
        """Return the turns of one forward pass's angles `[1, N, K]`, made once for all of its layers."""
        if id(cos) not in self._rotary:
            self._rotary[id(cos)] = (cos, Rotary.of_angles(cos[0], sin[0]))
        return self._rotary[id(cos)][1]  # Kept beside it, `cos` can't give its id to another tensor.

    def turns(self, rotary: Rotary) -> list[Rotary]:
        """Return the turns `[R, 1, L, K]` of each group, made once for all layers."""
        if id(rotary) not in self._turns:
            self._turns[id(rotary)] = (rotary, [rotary.at(group.tokens[:, None]) for group in self.groups])
        return self._turns[id(rotary)][1]

    def places(self, num_heads: int, num_keys: int, *, has_keys: bool = True) -> HeadPlaces:
        """Return where attention has the heads of `HeadPlaces`, made once for all layers."""
        key = (num_heads, num_keys, has_keys)
        if key not in self._places:
            self._places[key] = HeadPlaces.build(
                self.groups,
                sum(self.lengths),
                per_key=num_heads // num_keys,
                num_keys=num_keys,
                has_keys=has_keys,
            )
        return self._places[key]

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
