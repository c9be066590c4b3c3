"""Causal attention within each row of a packed batch, with a backward pass of our own; on a GPU torch's kernel does it.

torch's flash kernel takes ten times as long backward as forward on rows of 70 tokens on a CPU. Plain batched products
over groups of like length, whose scores fit into the cache, take a seventh of its time there, and half at 700 tokens.

Legend: `N` tokens, `H` query heads, `G` key and value heads, `K` head width, `R` rows, `L` longest row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from itertools import islice
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from smolora.models.bundle import read_config
from smolora.models.fused_ops import Rotary, draw_keep_mask
from smolora.models.rows import RowGroup, Rows

ROW_ATTENTION = "smolora_rows"
"""The name under which transformers knows `attend_interface`."""

_QUERY_BLOCK = 128
"""Queries handled at once: a block sees no key behind its last query, and its scores stay in the cache."""

_KEEP_PROBABILITIES_UP_TO = 256
"""Longest row whose attention weights are kept for backward; beyond, they are computed again (they grow with L * L)."""


@dataclass(frozen=True)
class AttentionSettings:
    """What attention does beside its inputs."""

    scale: float
    dropout: float = 0.0
    window: int | None = None
    """A token sees itself and at most `window` - 1 tokens before it."""


@dataclass
class _Saved:
    """What backward needs of one group: `[R, H or G, L, K]` each, and per block of queries what was kept."""

    query: Tensor
    key: Tensor
    value: Tensor
    probabilities: list[Tensor]
    keeps: list[Tensor]

    def to_list(self) -> list[Tensor]:
        """Return the tensors for `save_for_backward`, past which recomputed activations would keep them all."""
        return [self.query, self.key, self.value, *self.probabilities, *self.keeps]

    @classmethod
    def take(cls, tensors: Iterator[Tensor], group: RowGroup, settings: AttentionSettings) -> _Saved:
        """Return the state of one group from what `to_list` gave."""
        num_blocks = -(-group.length // _QUERY_BLOCK)
        query, key, value = islice(tensors, 3)
        kept = num_blocks if group.length <= _KEEP_PROBABILITIES_UP_TO else 0
        dropped = num_blocks if settings.dropout else 0
        return cls(query, key, value, list(islice(tensors, kept)), list(islice(tensors, dropped)))


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
        turned = heads if rotary is None else rotary.apply(heads)
        return attend_by_kernel(turned, num_heads=num_heads, rows=rows, settings=settings)
    output: Tensor = _RowAttention.apply(heads, num_heads, rows, settings, rotary)  # type: ignore[no-untyped-call]
    return output


def attend_interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    rows: Rows,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_unused: object,
) -> tuple[Tensor, None]:
    """`attend_rows` in the signature of transformers' AttentionInterface: `[1, H, N, K]` in, `[1, N, H, K]` out.

    Raises:
        ValueError: A mask, capped scores or sinks, none of which attention by rows has.
    """
    if attention_mask is not None or softcap is not None or s_aux is not None:
        raise ValueError("attention by rows takes no mask, no cap on scores and no sinks")
    heads = torch.cat((query, key, value), dim=1)[0].transpose(0, 1)
    settings = AttentionSettings(scaling, dropout, sliding_window)
    return attend_rows(heads, num_heads=query.shape[1], rows=rows, settings=settings)[None], None


def attends_by_rows(model: nn.Module) -> bool:
    """Whether the forward pass of `model` takes `rows`."""
    return str(read_config(model)._attn_implementation) == ROW_ATTENTION


@contextmanager
def row_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` attend by rows inside the block: its forward then takes `rows` and makes no mask."""
    AttentionInterface.register(ROW_ATTENTION, attend_interface)
    before = model.config._attn_implementation
    model.config._attn_implementation = ROW_ATTENTION
    try:
        yield
    finally:
        model.config._attn_implementation = before


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


def kernel_arguments(heads: Tensor, *, num_heads: int, rows: Rows, settings: AttentionSettings) -> KernelArguments:
    """Return how torch's kernel is asked for `attend_rows`."""
    shared = (heads.shape[1] - num_heads) // 2
    parts = torch.split(heads[: sum(rows.lengths)], [num_heads, shared, shared], dim=1)
    query, key, value = (part.contiguous() for part in parts)
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


def attend_by_kernel(heads: Tensor, *, num_heads: int, rows: Rows, settings: AttentionSettings) -> Tensor:
    """`attend_rows` by torch's kernel for rows of any length, which computes on a GPU alone."""
    attended = varlen_attn(**kernel_arguments(heads, num_heads=num_heads, rows=rows, settings=settings))
    assert isinstance(attended, Tensor), "no auxiliary output was asked for"
    return F.pad(attended, (0, 0, 0, 0, 0, len(heads) - len(attended)))


class _RowAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - apply takes no keywords
        ctx: Any,
        heads: Tensor,
        num_heads: int,
        rows: Rows,
        settings: AttentionSettings,
        rotary: Rotary | None,
    ) -> Tensor:
        shared = (heads.shape[1] - num_heads) // 2
        output = heads.new_empty(heads.shape[0], num_heads, heads.shape[2])
        if rotary is not None:
            heads = rotary.turn(heads)
        tensors = []
        for group in rows.groups:
            query, key, value = torch.split(group.pad(heads), [num_heads, shared, shared], dim=2)
            state = _Saved(_to_heads(query), _to_heads(key), _to_heads(value), [], [])
            group.unpad(_attend_group(state, group, settings).transpose(1, 2), output)
            tensors += state.to_list()
        output[sum(rows.lengths) :] = 0
        ctx.save_for_backward(*tensors)
        ctx.rows, ctx.settings, ctx.rotary, ctx.shape = rows, settings, rotary, heads.shape
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        output = grad.new_empty(ctx.shape)
        tensors = iter(ctx.saved_tensors)
        for group in ctx.rows.groups:
            state = _Saved.take(tensors, group, ctx.settings)
            blocks = _backward_group(state, _to_heads(group.pad(grad)), group, ctx.settings)
            group.unpad(torch.cat(blocks, dim=1).transpose(1, 2), output)
        output[sum(ctx.rows.lengths) :] = 0
        rotary: Rotary | None = ctx.rotary
        if rotary is not None:
            output = rotary.turn(output, back=True)
        return output, None, None, None, None


def _to_heads(block: Tensor) -> Tensor:
    """[R, L, H, K] -> [R, H, L, K], contiguous."""
    return block.transpose(1, 2).contiguous()


def _iter_blocks(length: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + _QUERY_BLOCK, length)) for start in range(0, length, _QUERY_BLOCK))


def _fold(tensor: Tensor, shared: int, start: int, end: int) -> Tensor:
    """[R, H, L, K] -> [R * G, H / G * (end - start), K]: the queries that read one key head, one below the other."""
    num_rows, heads, _, width = tensor.shape
    folded = tensor[:, :, start:end]
    return folded.reshape(num_rows * shared, heads // shared * (end - start), width)


def _attend_group(saved: _Saved, group: RowGroup, settings: AttentionSettings) -> Tensor:
    num_rows, heads, length, width = saved.query.shape
    value = saved.value.flatten(0, 1)
    output = torch.empty_like(saved.query)
    for start, end in _iter_blocks(length):
        probabilities = _probabilities(saved, group, settings, start, end)
        if length <= _KEEP_PROBABILITIES_UP_TO:
            saved.probabilities.append(probabilities)
        if settings.dropout:
            saved.keeps.append(draw_keep_mask(probabilities, settings.dropout))
            probabilities = probabilities * saved.keeps[-1] / (1 - settings.dropout)
        block = torch.bmm(probabilities, value[:, :end])
        output[:, :, start:end] = block.view(num_rows, heads, end - start, width)
    return output


def _probabilities(saved: _Saved, group: RowGroup, settings: AttentionSettings, start: int, end: int) -> Tensor:
    """Softmax of the scores of queries start..end: [R * G, H / G * (end - start), end]."""
    shared = saved.key.shape[1]
    mask = group.causal_mask(settings.window, saved.query)[start:end, :end].repeat(saved.query.shape[1] // shared, 1)
    key = saved.key.flatten(0, 1)[:, :end].transpose(1, 2)
    return torch.baddbmm(mask, _fold(saved.query, shared, start, end), key, alpha=settings.scale).softmax(-1)


def _backward_group(
    saved: _Saved, grad: Tensor, group: RowGroup, settings: AttentionSettings
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, heads, length, width = saved.query.shape
    shared = saved.key.shape[1]
    key, value = saved.key.flatten(0, 1), saved.value.flatten(0, 1)
    # Sums over several blocks are kept in float32, as one product would keep them.
    sums = torch.float32 if length > _QUERY_BLOCK else grad.dtype
    grad_query = torch.empty_like(saved.query)
    grad_key, grad_value = torch.zeros_like(key, dtype=sums), torch.zeros_like(value, dtype=sums)
    for number, (start, end) in enumerate(_iter_blocks(length)):
        if length <= _KEEP_PROBABILITIES_UP_TO:
            probabilities = saved.probabilities[number]
        else:
            probabilities = _probabilities(saved, group, settings, start, end)
        grad_block, query = _fold(grad, shared, start, end), _fold(saved.query, shared, start, end)
        grad_weights = torch.bmm(grad_block, value[:, :end].transpose(1, 2))
        used = probabilities
        if settings.dropout:
            factor = saved.keeps[number] / (1 - settings.dropout)
            used, grad_weights = probabilities * factor, (grad_weights * factor).to(grad.dtype)
        grad_value[:, :end] += torch.bmm(used.to(grad.dtype).transpose(1, 2), grad_block)
        scores = torch._softmax_backward_data(grad_weights, probabilities, -1, probabilities.dtype)
        grad_key[:, :end] += torch.bmm(scores.transpose(1, 2), query)
        grad_query[:, :, start:end] = torch.bmm(scores, key[:, :end]).view(num_rows, heads, end - start, width)
    grad_query.mul_(settings.scale)
    grad_key.mul_(settings.scale)
    shape = (num_rows, shared, length, width)
    return grad_query, grad_key.to(grad.dtype).view(shape), grad_value.to(grad.dtype).view(shape)
