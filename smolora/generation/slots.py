"""A cache with a slot for each row, and attention that reads it: how rows of any length decode in one forward pass.

The model's own forward runs. transformers is told to keep keys and values in a `SlotCache`, and to ask this module for
masks and attention. Live rows fill the first slots without a gap, so that no step gathers anything.

`B` rows of a step, `T` tokens of each, `L` keys read at most, `H` heads, `G` heads of keys, `K` head width, `Q` queries
that share a key, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from smolora.generation.tables import Lookups, are_few
from smolora.models.fused_ops import MadeOnce, Rotary
from smolora.models.structure import replaced_attention
from smolora.runtime.device import has_matrix_units

_IMPLEMENTATION = "smolora_slots"
_BLOCK_ROWS = 16
_HEADROOM = 128
_HALF = (torch.bfloat16, torch.float16)

FEWEST_ROWS = 4
"""With fewer rows torch's kernel attends in two thirds of the time that tables take, and a step in float32 waits for
the weights from memory, in whatever layout. In bfloat16 it doesn't: one row and 32,000 outputs take .5 ms packed, and
.9 as they are."""


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

    _turns: MadeOnce[Rotary] = field(default_factory=MadeOnce, repr=False, compare=False)
    _visible: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)
    _lookups: dict[object, Lookups | None] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of_prompts(cls, first_slot: int, num_rows: int, num_tokens: int, device: torch.device) -> Step:
        """Fill slots from their start."""
        positions = torch.arange(num_tokens, device=device)[None]
        return cls(slice(first_slot, first_slot + num_rows), positions, ((slice(0, num_rows), num_tokens),), fills=True)

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


class SlotCache(Cache):  # type: ignore[misc]
    """Keys and values of every layer, [slots, G, reach, K] each, written in place."""

    def __init__(self, num_slots: int, longest: int) -> None:
        super().__init__(layers=[])
        self.num_slots, self._longest = num_slots, longest
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's keys and values [B, G, T, K] of the step, and return all that its rows may read."""
        return self._write(key_states, value_states, layer_idx, key_type=key_states.dtype)

    def update_for_attend(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Do the same for nobody but `attend`, which compares float32 where it reads tables, whatever the model has."""
        wide = _reads_tables(key_states, self.num_slots)
        return self._write(key_states, value_states, layer_idx, key_type=torch.float32 if wide else key_states.dtype)

    def _write(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *, key_type: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        step = _STEP.get()
        buffers = self._reserve(layer_idx, key_states, value_states, key_type)
        keys, values = (buffer[step.slots] for buffer in buffers)
        if step.fills:
            keys[:, :, : step.num_tokens], values[:, :, : step.num_tokens] = key_states, value_states
            return key_states, value_states
        rows = step.rows[:, None]
        keys[rows, :, step.positions] = key_states.transpose(1, 2).to(key_type)
        values[rows, :, step.positions] = value_states.transpose(1, 2)
        return keys[:, :, : step.num_keys], values[:, :, : step.num_keys]

    def turn(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return queries and keys [B, T, heads, K] turned by angles [B or 1, T, K]: themselves, or float32 for tables.

        Where float32 is compared anyway, it takes half of the time that 16 bits take.
        """
        step = _STEP.get()
        if not step.fills and _reads_tables(heads, self.num_slots):
            heads = heads.float()
        return step.turns(cos, sin, heads.dtype).turn_(heads)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the `length` tokens of a row into another slot."""
        for keys, values in self._buffers.values():
            keys[target, :, :length] = keys[source, :, :length]
            values[target, :, :length] = values[source, :, :length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens the longest row had before this step; positions are given, so it decides nothing."""
        return self.get_mask_sizes(0, layer_idx)[0] - _STEP.get().num_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return how many keys this step reads, and the first of them."""
        return _STEP.get().num_keys, 0

    def _reserve(
        self, layer_idx: int, key_states: Tensor, value_states: Tensor, key_type: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return a layer's buffers, larger ones (`longest` at most) where the step reads further than they reach.

        New ones hold zeros: a key out of sight has the weight 0, but 0 times whatever memory held may be NaN.
        """
        length, before = _STEP.get().num_keys, self._buffers.get(layer_idx)
        if before is not None and length <= before[1].shape[2]:
            return before
        capacity = min(self._longest, length + max(_HEADROOM, length // 2))
        heads = self.num_slots, key_states.shape[1]
        keys = key_states.new_zeros(*heads, capacity, key_states.shape[3], dtype=key_type)
        values = value_states.new_zeros(*heads, capacity, value_states.shape[3])
        if before is not None:
            reach = before[1].shape[2]
            keys[:, :, :reach], values[:, :, :reach] = before
        self._buffers[layer_idx] = keys, values
        return keys, values


def forward(model: nn.Module, cache: SlotCache, step: Step, input_ids: Tensor) -> Tensor:
    """Run `model` over tokens [B, T], and return the logits [B, T, V] after each, or useless ones where it fills."""
    num_kept = 1 if step.fills else step.num_tokens
    token = _STEP.set(step)
    try:
        output = model(
            input_ids=input_ids,
            position_ids=step.positions.expand(len(input_ids), -1),
            past_key_values=cache,
            use_cache=True,
            # A place, not a number: a slice has gaps, and its product with a frozen weight repeats that for every row
            # (16 rows and 50,257 words in bfloat16: 1.7 s in place of .004).
            logits_to_keep=step.positions.new_tensor([-1]) if step.fills else num_kept,
        )
    finally:
        _STEP.reset(token)
    logits: Tensor = output.logits[:, -num_kept:]
    return logits


def is_filling() -> bool:
    """Whether the forward pass that is being made, by `forward`, fills slots with prompts: its logits are of no use."""
    step = _STEP.get(None)
    return step is not None and step.fills


def slot_attention(configs: Sequence[PretrainedConfig]) -> AbstractContextManager[None]:
    """Let a model of these `find_configs` ask this module for masks and attention for the block."""
    return replaced_attention(configs, _IMPLEMENTATION, attend, _mask)


def _mask(
    *, mask_function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype, **_: object
) -> Tensor:
    """Return what is added to scores, [B or 1, 1, T, L]: 0 for a key that a token may see, else the lowest number.

    `mask_function` is the family's own (causal, or with a sliding window). It compares positions, so what a slot still
    holds of an earlier row, and the padding behind a shorter prompt, are out of sight.
    """
    step = _STEP.get()
    rows = step.rows[: len(step.positions)]
    keys = torch.arange(step.num_keys, device=rows.device)
    visible = mask_function(
        rows[:, None, None, None], rows.new_zeros(1, 1, 1, 1), step.positions[:, None, :, None], keys[None, None, None]
    )
    mask = torch.zeros(visible.shape, dtype=dtype, device=rows.device).masked_fill_(~visible, torch.finfo(dtype).min)
    step.remember(mask, visible)
    return mask


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Return the mixed values [B, T, H, K] of queries [B, H, T, K] over keys and values [B, G, L, K]."""
    step = _STEP.get()
    if step.fills and softcap is None:
        mixed, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)
        return mixed, None
    B, H, T, K = query.shape
    num_groups = H // key.shape[1]
    folded = query.reshape(B, key.shape[1], num_groups * T, K)  # Heads that share a key read it once.
    assert attention_mask is not None, "`_mask` makes one for every step"
    scale = K**-0.5 if scaling is None else scaling
    # Keys are wider than values where the cache was made for tables, however few of its rows are left.
    is_wide = key.dtype != value.dtype or (value.dtype == torch.float32 and _reads_tables(query, B))
    by_tables = is_wide and query.device.type == "cpu"
    lookups = None
    if by_tables and are_few(folded.shape[2]):
        lookups = step.lookups(key, value, folded.shape[2], attention_mask)
    if lookups:
        scores = _cap(lookups.score(folded.to(key.dtype), key, scale), softcap)
        mixed = lookups.mix(lookups.softmax(scores).to(value.dtype), value)
    else:
        mixed = _attend_in_blocks(folded, key, value, attention_mask, scale, softcap=softcap, by_tables=by_tables)
    mixed = mixed.reshape(B, H, T, -1)
    return mixed.transpose(1, 2).contiguous(), None  # As transformers has it: some families take a view of it.


def _attend_in_blocks(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scale: float,
    *,
    softcap: float | None,
    by_tables: bool,
) -> Tensor:
    """Return the mixed values of queries [B, G, Q, K], each block of rows for itself, as far as its longest reads."""
    step = _STEP.get()
    num_groups = queries.shape[2] // step.num_tokens
    per_group = mask.expand(-1, -1, num_groups, -1) if step.num_tokens == 1 else mask.repeat(1, 1, num_groups, 1)
    wide = per_group.expand(len(queries), -1, -1, -1)
    parts = []
    for rows, length in step.blocks:
        part = queries[rows], keys[rows, :, :length], values[rows, :, :length], wide[rows, :, :, :length]
        if softcap is None and not by_tables and queries.device.type == "cpu":
            parts.append(_attend_by_kernel(*part, scale))
        else:
            mixes_by_lookups = by_tables and values.dtype in _HALF  # A product of 16 bits copies what has gaps.
            lookups = step.lookups(*part[1:3], queries.shape[2]) if mixes_by_lookups else None
            parts.append(_attend_by_products(*part, scale, softcap=softcap, lookups=lookups))
    return torch.cat(parts)


def _attend_by_products(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scale: float,
    *,
    softcap: float | None,
    lookups: Lookups | None,
) -> Tensor:
    """Return the mixed values of queries [B, G, Q, K], mixed by `lookups` where there are any."""
    scores = _cap(torch.matmul(queries.to(keys.dtype) * scale, keys.transpose(2, 3)), softcap)
    weights = scores.add(mask).softmax(-1).to(values.dtype)
    return lookups.mix(weights.flatten(), values) if lookups else torch.matmul(weights, values)


def _cap(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _attend_by_kernel(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Return the mixed values of queries [B, G, Q, K] by torch's kernel."""
    num_queries = queries.shape[2]
    if num_queries == 1 and queries.dtype != torch.float32 and not has_matrix_units():
        queries = queries.expand(-1, -1, 2, -1)  # Of one alone it takes 230 us, of two 88 (a row of 800 keys, 6 heads).
    mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    return mixed[:, :, :num_queries]


def _reads_tables(like: Tensor, num_rows: int) -> bool:
    """Whether a few queries a row are compared with keys as rows of a table: on a CPU, where rows aren't very few.

    In bfloat16 with matrix units torch's kernel reads them fast enough, in half of the memory.
    """
    if like.device.type != "cpu" or num_rows < FEWEST_ROWS:
        return False
    return like.dtype == torch.float32 or (like.dtype in _HALF and not has_matrix_units())
