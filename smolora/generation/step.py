"""One forward pass over rows of any length: where each token goes, and what it sees.

`B` rows of a step, `T` tokens of each, `L` keys read at most, `H` heads, `G` heads of keys, `K` head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from smolora.generation.tables import Lookups
from smolora.models.fused_ops import MadeOnce, Rotary
from smolora.models.rows import Rows

_BLOCK_ROWS = 16


@dataclass(frozen=True)
class Step:
    """Where one forward pass writes and what it reads."""

    slots: slice
    positions: Tensor
    """[B, T], or [1, T] where all rows have the same."""

    blocks: tuple[tuple[slice, int], ...]
    """Rows of the step, and how many keys they read where they don't look up each its own."""

    fills: bool = False
    """Whether its rows are new, so that a token sees none but those of the step."""

    packed: Rows | None = None
    """How the tokens [1, T] of new rows divide into them, where they lie end to end."""

    _turns: MadeOnce[Rotary] = field(default_factory=MadeOnce, repr=False, compare=False)
    _visible: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)
    _places: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False, compare=False)
    _causal: dict[int, bool] = field(default_factory=dict, repr=False, compare=False)
    _lookups: dict[object, Lookups | None] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of_prompts(cls, first_slot: int, num_rows: int, num_tokens: int, device: torch.device) -> Step:
        """Fill slots from their start."""
        positions = torch.arange(num_tokens, device=device)[None]
        return cls(slice(first_slot, first_slot + num_rows), positions, ((slice(0, num_rows), num_tokens),), fills=True)

    @classmethod
    def of_packed_prompts(cls, first_slot: int, lengths: Sequence[int], device: torch.device) -> Step:
        """Fill slots from their start, with prompts that lie end to end."""
        rows = slice(first_slot, first_slot + len(lengths))
        positions = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
        blocks = ((slice(0, len(lengths)), max(lengths)),)
        return cls(rows, positions, blocks, fills=True, packed=Rows(lengths, device))

    @classmethod
    def of_next_tokens(cls, positions: Sequence[Sequence[int]], device: torch.device) -> Step:
        """Go on by one or more tokens in each of the first slots, at `positions` [B, T] that ascend.

        Rows that don't look up keys read in blocks, where a long one makes its neighbours read as far as itself.
        """
        blocks = [slice(start, start + _BLOCK_ROWS) for start in range(0, len(positions), _BLOCK_ROWS)]
        return cls(
            slice(0, len(positions)),
            torch.tensor(positions, device=device),
            tuple((block, 1 + max(row[-1] for row in positions[block])) for block in blocks),
        )

    @cached_property
    def rows(self) -> Tensor:
        """[B], from 0."""
        return torch.arange(self.slots.stop - self.slots.start, device=self.positions.device)

    def turns(self, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Rotary:
        """Return the turns [B or 1, T, 1, K] of angles [B or 1, T, K], made once for all layers that share them."""
        return self._turns.of(cos, lambda: Rotary.of_angles(cos[:, :, None].to(dtype), sin[:, :, None].to(dtype)))

    def places(self, num_heads: int, capacity: int) -> Tensor:
        """Return where the keys [T * G] of packed rows lie in the table [slots * G * capacity] of a cache's buffer."""
        assert self.packed, "other rows lie in a buffer as they are"
        if (num_heads, capacity) not in self._places:
            lengths = torch.tensor(self.packed.lengths, device=self.positions.device)
            slots = torch.arange(self.slots.start, self.slots.stop, device=lengths.device).repeat_interleave(lengths)
            heads = slots[:, None] * num_heads + torch.arange(num_heads, device=lengths.device)
            self._places[num_heads, capacity] = (heads * capacity + self.positions[0, :, None]).flatten()
        return self._places[num_heads, capacity]

    def is_causal(self, mask: Tensor | None) -> bool:
        """Whether a remembered `mask` hides what lies behind a token of a prompt, and nothing else."""
        if id(mask) not in self._causal:
            _, visible = self._visible.get(id(mask), (mask, None))
            self._causal[id(mask)] = visible is not None and torch.equal(visible, torch.ones_like(visible).tril())
        return self._causal[id(mask)]

    def remember(self, mask: Tensor, visible: Tensor) -> None:
        """Keep in mind that `mask` hides every key but those of `visible` [B, 1, T, L], and does nothing else."""
        self._visible[id(mask)] = mask, visible

    def lookups(self, keys: Tensor, values: Tensor, num_queries: int, mask: Tensor | None = None) -> Lookups | None:
        """Return how queries look up keys [B, G, L, K], those in sight or all, once for layers whose keys lie alike.

        None for keys that are no table, and for a mask that isn't remembered: a family made it of another.
        """
        if mask is not None and id(mask) not in self._visible:
            return None
        place = id(mask), keys.shape, keys.stride(), values.shape, values.stride(), num_queries
        if place not in self._lookups:
            num_groups = num_queries // self.num_tokens
            seen = None if mask is None else self._visible[id(mask)][1].repeat(1, 1, num_groups, 1)
            self._lookups[place] = Lookups.of(keys, values, num_queries, seen)
        return self._lookups[place]

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.positions.shape[1]

    @cached_property
    def num_keys(self) -> int:
        """L."""
        return max(length for _, length in self.blocks)


_STEP: ContextVar[Step] = ContextVar("step")


def current_step() -> Step:
    """Return the step of the forward pass that is being made."""
    return _STEP.get()


@contextmanager
def making(step: Step) -> Iterator[None]:
    """Make a forward pass of this step in the block."""
    token = _STEP.set(step)
    try:
        yield
    finally:
        _STEP.reset(token)


def is_filling() -> bool:
    """Whether the forward pass that is being made, by `forward`, fills slots with prompts: its logits are of no use."""
    step = _STEP.get(None)
    return step is not None and step.fills


def is_packed() -> bool:
    """Whether the forward pass that is being made, by `forward`, fills slots with prompts that lie end to end."""
    step = _STEP.get(None)
    return step is not None and step.packed is not None
