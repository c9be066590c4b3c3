"""A cache with a slot for each row, and attention that reads it: how rows of any length decode in one forward pass.

The model's own forward runs. transformers is told to keep keys and values in a `SlotCache`, and to ask this module for
masks and attention. Live rows fill the first slots without a gap, so that no step gathers anything.

`B` rows of a step, `T` tokens of each, `L` keys read at most, `H` heads, `G` heads of keys, `K` head width, `Q` queries
that share a key, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from smolora.generation.step import Step, current_step, making
from smolora.generation.tables import Lookups, are_few
from smolora.models.row_attention import AttentionSettings, attend_rows, mask_interface
from smolora.models.structure import replaced_attention
from smolora.runtime.device import has_matrix_units

_IMPLEMENTATION = "smolora_slots"
_HEADROOM = 128
_HALF = (torch.bfloat16, torch.float16)

FEWEST_ROWS = 4
"""With fewer rows torch's kernel attends in two thirds of the time that tables take, and a step in float32 waits for
the weights from memory, in whatever layout. In bfloat16 it doesn't: one row and 32,000 outputs take .5 ms packed, and
.9 as they are."""


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
        """Do the same for `attend`, which compares float32 where it reads tables. Values have the model's type."""
        wide = _reads_tables(value_states, self.num_slots)
        return self._write(key_states, value_states, layer_idx, key_type=torch.float32 if wide else value_states.dtype)

    def _write(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *, key_type: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        step = current_step()
        buffers = self._reserve(layer_idx, key_states, value_states, key_type)
        keys, values = (buffer[step.slots] for buffer in buffers)
        if step.packed:
            places = step.places(*keys.shape[1:3])
            for buffer, states in zip(buffers, (key_states, value_states), strict=True):
                rows = states[0].transpose(0, 1).flatten(0, 1)  # [T * G, K]
                buffer.view(-1, rows.shape[1]).index_copy_(0, places, rows.to(buffer.dtype))
            return key_states, value_states
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
        step = current_step()
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
        return self.get_mask_sizes(0, layer_idx)[0] - current_step().num_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return how many keys this step reads, and the first of them."""
        return current_step().num_keys, 0

    def _reserve(
        self, layer_idx: int, key_states: Tensor, value_states: Tensor, key_type: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return a layer's buffers, larger ones (`longest` at most) where the step reads further than they reach.

        New ones hold zeros: a key out of sight has the weight 0, but 0 times whatever memory held may be NaN.
        """
        length, before = current_step().num_keys, self._buffers.get(layer_idx)
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
    with making(step):
        output = model(
            input_ids=input_ids,
            position_ids=step.positions.expand(len(input_ids), -1),
            past_key_values=cache,
            use_cache=True,
            # A place, not a number: a slice has gaps, and its product with a frozen weight repeats that for every row
            # (16 rows and 50,257 words in bfloat16: 1.7 s in place of .004).
            logits_to_keep=step.positions.new_tensor([-1]) if step.fills else num_kept,
        )
    logits: Tensor = output.logits[:, -num_kept:]
    return logits


def slot_attention(configs: Sequence[PretrainedConfig]) -> AbstractContextManager[None]:
    """Let a model of these `find_configs` ask this module for masks and attention for the block."""
    return replaced_attention(configs, _IMPLEMENTATION, attend, _mask)


def _mask(
    *, mask_function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype, **others: Any
) -> Tensor | int | None:
    """Return what is added to scores, [B or 1, 1, T, L]: 0 for a key that a token may see, else the lowest number.

    `mask_function` is the family's own (causal, or with a sliding window). It compares positions, so what a slot still
    holds of an earlier row, and the padding behind a shorter prompt, are out of sight.
    """
    step = current_step()
    if step.packed:
        return mask_interface(**others)
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
    step = current_step()
    if step.fills and softcap is None:
        is_causal = step.is_causal(attention_mask)  # The kernel leaves out what it needn't read then.
        mask = None if is_causal else attention_mask
        mixed, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, is_causal=is_causal or None)
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


def attend_prompts(heads: Tensor, *, num_heads: int, window: int | None, scaling: float) -> Tensor:
    """Return the mixed values [1, T, H, K] of packed rows' queries, keys and values [1, T, H + 2 * G, K]."""
    rows, settings = current_step().packed, AttentionSettings(scaling, window=window)
    assert rows, "prompts lie end to end"
    return attend_rows(heads[0], num_heads=num_heads, rows=rows, settings=settings)[None]


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
    step = current_step()
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
    """Whether a few queries a row are compared with keys as rows of a table, where rows aren't very few."""
    return num_rows >= FEWEST_ROWS and compares_float32(like)


def compares_float32(like: Tensor) -> bool:
    """Whether queries and keys are compared in float32, whatever type the model has: on a CPU.

    In bfloat16 with matrix units torch's kernel reads them fast enough, in half of the memory.
    """
    if like.device.type != "cpu":
        return False
    return like.dtype == torch.float32 or (like.dtype in _HALF and not has_matrix_units())
