"""Causal attention within each row of a packed batch, with a backward pass of our own; on a GPU torch's kernel does it.

torch's flash kernel takes ten times as long backward as forward on rows of 70 tokens on a CPU. Plain batched products
over groups of like length, whose scores fit into the cache, take a seventh of its time there, and half at 700 tokens.

Legend: `N` tokens, `H` query heads, `G` key and value heads, `P` = H / G, `K` head width, `R` rows, `L` longest row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import PretrainedConfig, PreTrainedModel

from smolora.models.bundle import read_config
from smolora.models.fused_ops import Dropped, Rotary
from smolora.models.rows import HeadPlaces, RowGroup, Rows
from smolora.models.structure import find_configs, replaced_attention

ROW_ATTENTION = "smolora_rows"
"""The name under which transformers knows `attend_interface` and `mask_interface`."""

_QUERY_BLOCK, _QUERY_BLOCK_16_BITS = 128, 256
"""Queries handled at once: a block sees no key behind its last query, and its scores stay in the cache. In 16 bits the
matrix units are so fast that the fewer sums of larger blocks pay: 17 in place of 24 ms for 16 rows of 256 tokens."""

_KEEP_PROBABILITIES_UP_TO = 256
"""Longest row whose attention weights are kept for backward; beyond, they are computed again (they grow with L * L)."""


@dataclass(frozen=True)
class AttentionSettings:
    """What attention does beside its inputs."""

    scale: float
    dropout: float = 0.0
    window: int | None = None
    """A token sees itself and at most `window` - 1 tokens before it."""


def attend_rows(
    heads: Tensor, *, num_heads: int, rows: Rows, settings: AttentionSettings, rotary: Rotary | None = None
) -> Tensor:
    """Return `[N, H, K]`: softmax(scale * QK^T) V over the tokens of the same row up to each token.

    Args:
        heads: `[N, H + 2 * G, K]`: queries, keys and values, as one projection gives them; query head h reads key head
            h // (H / G).
        num_heads: H.
        rows: How the N tokens divide into rows; filler behind the last row gets zeros.
        settings: Scale, dropout of the weights, sliding window.
        rotary: Turns queries and keys first.
    """
    assert sum(rows.lengths) <= len(heads), "rows are tokens of the batch"
    if _has_kernel(heads, settings):
        return attend_by_kernel(heads, num_heads=num_heads, rows=rows, settings=settings, rotary=rotary)
    output: Tensor = _AttendRows.apply(heads, num_heads, rows, settings, rotary)  # type: ignore[no-untyped-call]
    return output


def attend_interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | int | None,
    *,
    scaling: float,
    rows: Rows | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_unused: object,
) -> tuple[Tensor, None]:
    """`attend_rows` in the signature of transformers' AttentionInterface: `[1, H, N, K]` in, `[1, N, H, K]` out.

    `attention_mask` is what `mask_interface` gave. The window is read there, where plain attention finds it too: some
    families put it into the mask alone, and pass no `sliding_window`.

    Raises:
        ValueError: No rows, a mask, capped scores, sinks, or values of another width than keys.
    """
    if rows is None:
        raise ValueError("the model doesn't tell its attention where rows begin")
    if isinstance(attention_mask, Tensor) or softcap is not None or s_aux is not None:
        raise ValueError("attention by rows takes no mask, no cap on scores and no sinks")
    if query.shape[3] != value.shape[3]:
        raise ValueError(
            f"attention by rows needs values as wide as keys: {value.shape[3]} and {query.shape[3]} are not"
        )
    heads = torch.cat((query, key, value), dim=1)[0].transpose(0, 1)
    settings = AttentionSettings(scaling, dropout, attention_mask)
    return attend_rows(heads, num_heads=query.shape[1], rows=rows, settings=settings)[None], None


def mask_interface(
    *, config: PretrainedConfig, use_vmap: bool = False, local_size: int | None = None, **_unused: object
) -> int | None:
    """Return the window of the layers that a mask is made for, in the place of the mask; None where they have none.

    The signature is that of transformers' AttentionMaskInterface.

    Raises:
        ValueError: The mask hides more or less than what is behind a token or before its window.
    """
    if use_vmap:
        raise ValueError("attention by rows takes no mask of a model's own")
    if local_size is not None and local_size != vars(config).get("sliding_window"):
        raise ValueError(f"attention by rows takes windows and no chunks, and these are of {local_size} tokens")
    return local_size


def attends_by_rows(model: nn.Module) -> bool:
    """Whether the forward pass of `model` takes `rows`."""
    return str(read_config(model)._attn_implementation) == ROW_ATTENTION


def row_attention(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Let `model` attend by rows inside the block: its forward then takes `rows`."""
    return replaced_attention(find_configs(model), ROW_ATTENTION, attend_interface, mask_interface)


def _has_kernel(heads: Tensor, settings: AttentionSettings) -> bool:
    """Whether torch's kernel for rows of any length takes this: half precision on a GPU, heads to 256, no dropout."""
    if heads.device.type != "cuda" or "enable_gqa" not in signature(varlen_attn).parameters:  # torch 2.12
        return False
    is_half = heads.dtype in {torch.bfloat16, torch.float16} and torch.cuda.get_device_capability(heads.device) >= (
        8,
        0,
    )
    return is_half and heads.shape[2] <= 256 and not settings.dropout


class KernelArguments(TypedDict):
    """What torch's `varlen_attn` takes, by its own names."""

    query: Tensor
    """[n, H, K]: the tokens of rows alone, without filler"""
    key: Tensor
    """[n, G, K]"""
    value: Tensor
    """[n, G, K]"""
    cu_seq_q: Tensor
    cu_seq_k: Tensor
    max_q: int
    max_k: int
    scale: float
    window_size: tuple[int, int]
    """How many tokens before and behind itself a token sees, of its own row; -1 is all."""
    enable_gqa: bool


def kernel_arguments(
    heads: Tensor, *, num_heads: int, rows: Rows, settings: AttentionSettings, rotary: Rotary | None = None
) -> KernelArguments:
    """Return how torch's kernel is asked for `attend_rows`."""
    num_tokens, shared = sum(rows.lengths), (heads.shape[1] - num_heads) // 2
    query, key, value = torch.split(heads[:num_tokens], [num_heads, shared, shared], dim=1)
    if rotary is not None:
        turns = Rotary(rotary.cos[:num_tokens], rotary.sin[:num_tokens])
        query, key = turns.apply(query), turns.apply(key)
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    longest = max(rows.lengths)
    return KernelArguments(
        query=query,
        key=key,
        value=value,
        cu_seq_q=rows.boundaries,
        cu_seq_k=rows.boundaries,
        max_q=longest,
        max_k=longest,
        scale=settings.scale,
        window_size=(-1 if settings.window is None else settings.window - 1, 0),
        enable_gqa=num_heads != shared,
    )


def attend_by_kernel(
    heads: Tensor, *, num_heads: int, rows: Rows, settings: AttentionSettings, rotary: Rotary | None = None
) -> Tensor:
    """`attend_rows` by torch's kernel for rows of any length, which computes on a GPU alone."""
    arguments = kernel_arguments(heads, num_heads=num_heads, rows=rows, settings=settings, rotary=rotary)
    attended = varlen_attn(**arguments)
    assert isinstance(attended, Tensor), "no auxiliary output was asked for"
    return F.pad(attended, (0, 0, 0, 0, 0, len(heads) - len(attended)))


class _Block(NamedTuple):
    """The heads of one group of rows, or their gradients, as views of the whole."""

    query: Tensor
    """[G * R, P, L, K]"""
    key: Tensor
    """[G * R, L, K]"""
    value: Tensor
    """[G * R, L, K]"""

    @classmethod
    def split(cls, flat: Tensor, places: HeadPlaces) -> list[_Block]:
        """Return the block of each group that lies in `flat`, `[places, K]`."""
        return [cls(query, key[:, 0], value[:, 0]) for query, key, value in places.split(flat)]

    def turn_(self, rotary: Rotary, *, back: bool = False) -> None:
        """Turn queries and keys in place, by turns `[R, 1, L, K]`."""
        num_rows = len(rotary.cos)
        for heads in (self.query, self.key[:, None]):
            rotary.turn_(heads.view(-1, num_rows, *heads.shape[1:]), back=back)


class _AttendRows(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - apply takes no keywords
        ctx: Any,
        heads: Tensor,
        num_heads: int,
        rows: Rows,
        settings: AttentionSettings,
        rotary: Rotary | None,
    ) -> Tensor:
        num_shared, width = (heads.shape[1] - num_heads) // 2, heads.shape[2]
        places, query_places = rows.head_places(num_heads, num_shared), rows.query_places(num_heads, num_shared)
        gathered = heads.reshape(-1, width).index_select(0, places.heads)
        attended = heads.new_empty(len(query_places.heads), width)
        kept: list[Tensor] = []
        blocks, outputs = _Block.split(gathered, places), query_places.split(attended)
        for number, (group, block, [into]) in enumerate(zip(rows.groups, blocks, outputs, strict=True)):
            if rotary is not None:
                block.turn_(rows.turns(rotary)[number])
            kept += _attend_group(block, group=group, settings=settings, into=into)
        ctx.save_for_backward(gathered, *kept)
        ctx.rows, ctx.settings, ctx.rotary, ctx.num_heads, ctx.num_shared = (
            rows,
            settings,
            rotary,
            num_heads,
            num_shared,
        )
        return _bring_back(attended, query_places, num_tokens=len(heads))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        rows: Rows = ctx.rows
        rotary: Rotary | None = ctx.rotary
        places, query_places = (make(ctx.num_heads, ctx.num_shared) for make in (rows.head_places, rows.query_places))
        gathered, *kept = ctx.saved_tensors
        tensors = iter(kept)
        outputs = grad.reshape(-1, grad.shape[2]).index_select(0, query_places.heads)
        outputs.index_fill_(0, query_places.padding, 0)
        gradients = torch.empty_like(gathered)
        blocks, intos = (_Block.split(x, places) for x in (gathered, gradients))
        together = zip(rows.groups, blocks, intos, query_places.split(outputs), strict=True)
        for number, (group, block, into, [of_output]) in enumerate(together):
            _backward_group(block, of_output, into=into, group=group, settings=ctx.settings, kept=tensors)
            if rotary is not None:
                into.turn_(rows.turns(rotary)[number], back=True)
        return _bring_back(gradients, places, num_tokens=len(grad)), None, None, None, None


def _bring_back(flat: Tensor, places: HeadPlaces, *, num_tokens: int) -> Tensor:
    """Return `[N, heads, K]` of what lies at its places, `[places, K]`; filler gets zeros."""
    num_heads = sum(num_shared * per_key for num_shared, _, per_key, _ in places.shapes[0])
    output = flat.new_empty(num_tokens, num_heads, flat.shape[1])
    flat_output = output.view(-1, flat.shape[1])
    torch.index_select(flat, 0, places.places, out=flat_output[: len(places.places)])
    flat_output[len(places.places) :] = 0
    return output


def _query_block(dtype: torch.dtype) -> int:
    return _QUERY_BLOCK_16_BITS if dtype.itemsize == 2 else _QUERY_BLOCK


def _iter_blocks(length: int, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    size = _query_block(dtype)
    return ((start, min(start + size, length)) for start in range(0, length, size))


def _attend_group(block: _Block, *, group: RowGroup, settings: AttentionSettings, into: Tensor) -> list[Tensor]:
    """Write what the queries of a group read, `[G * R, P, L, K]`; return what backward needs of each block of them."""
    kept = []
    for start, end in _iter_blocks(group.length, into.dtype):
        probabilities = _probabilities(block, group=group, settings=settings, start=start, end=end)
        if group.length <= _KEEP_PROBABILITIES_UP_TO:
            kept.append(probabilities)
        if settings.dropout:
            dropped = Dropped.draw(probabilities, settings.dropout)
            kept.append(dropped.places)
            probabilities = _drop(probabilities, dropped, settings)
        _multiply(probabilities, block.value[:, :end], into=into[:, :, start:end])
    return kept


def _probabilities(block: _Block, *, group: RowGroup, settings: AttentionSettings, start: int, end: int) -> Tensor:
    """Softmax of the scores of queries start..end: `[G * R, P * (end - start), end]`."""
    mask = group.causal_mask(settings.window, block.query)[start:end, :end].repeat(block.query.shape[1], 1)
    query, key = block.query[:, :, start:end].flatten(1, 2), block.key[:, :end].transpose(1, 2)
    return torch.baddbmm(mask, query, key, alpha=settings.scale).softmax(-1)


def _backward_group(
    block: _Block,
    grad: Tensor,
    *,
    into: _Block,
    group: RowGroup,
    settings: AttentionSettings,
    kept: Iterator[Tensor],
) -> None:
    """Write the gradients of a group's heads, of `grad`, `[G * R, P, L, K]`, and what `_attend_group` returned."""
    # Sums over several blocks are kept in float32 at least, as one product would keep them.
    is_whole = group.length <= _query_block(grad.dtype)
    wide = torch.promote_types(grad.dtype, torch.float32)
    sums = [x if is_whole else torch.zeros_like(x, dtype=wide) for x in (into.key, into.value)]
    for start, end in _iter_blocks(group.length, grad.dtype):
        if group.length <= _KEEP_PROBABILITIES_UP_TO:
            probabilities = next(kept)
        else:
            probabilities = _probabilities(block, group=group, settings=settings, start=start, end=end)
        grad_part, query = grad[:, :, start:end].flatten(1, 2), block.query[:, :, start:end].flatten(1, 2)
        grad_weights = torch.bmm(grad_part, block.value[:, :end].transpose(1, 2))
        used = probabilities
        if settings.dropout:
            dropped = Dropped(next(kept))
            used, grad_weights = (_drop(x, dropped, settings) for x in (probabilities, grad_weights))
        scores = torch._softmax_backward_data(grad_weights, probabilities, -1, probabilities.dtype)
        _multiply(scores, block.key[:, :end], into=into.query[:, :, start:end], scale=settings.scale)
        if is_whole:
            _multiply(scores.transpose(1, 2), query, into=into.key, scale=settings.scale)
            _multiply(used.transpose(1, 2), grad_part, into=into.value)
        else:
            sums[0][:, :end] += torch.bmm(scores.transpose(1, 2), query)
            sums[1][:, :end] += torch.bmm(used.transpose(1, 2), grad_part)
    if not is_whole:
        torch.mul(sums[0], settings.scale, out=into.key)
        into.value.copy_(sums[1])


def _drop(weights: Tensor, dropped: Dropped, settings: AttentionSettings) -> Tensor:
    return dropped.zero_(weights.div(1 - settings.dropout))


def _multiply(a: Tensor, b: Tensor, *, into: Tensor, scale: float = 1.0) -> None:
    """Write scale * a b to `into`, `[batch, n, K]` or, of a part of the queries, `[batch, P, part, K]`."""
    if into.is_contiguous():
        into.view(len(a), a.shape[1], b.shape[2]).baddbmm_(a, b, beta=0, alpha=scale)
    else:
        torch.mul(torch.bmm(a, b).view(into.shape), scale, out=into)
