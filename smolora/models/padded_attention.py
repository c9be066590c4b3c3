"""Attention over padded batches in 16 bits on a CPU, by plain products.

torch's flash kernel takes two to eight times as long there, most of it backward, up to rows of some 300 tokens (16
rows of 70, 12 heads of 32: 32 ms and 5, forward and backward); in float32 it is the faster one.

Legend: `B` rows, `T` queries, `L` keys, `H` heads, `G` heads that share a key, `K` head width.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from smolora.models.structure import find_configs, replaced_attention

_PADDED_ATTENTION = "smolora_padded"
_LONGEST = 256
"""Keys up to which products are faster; their weights are kept for backward, and grow with T * L."""


def is_faster_by_products(model: PreTrainedModel) -> bool:
    """Whether `model` asks torch's kernel for attention where products are faster."""
    is_narrow = model.dtype in {torch.bfloat16, torch.float16}
    return is_narrow and model.device.type == "cpu" and model.config._attn_implementation == "sdpa"


def padded_attention(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Let `model` attend by products inside the block."""
    return replaced_attention(find_configs(model), _PADDED_ATTENTION, attend_padded, eager_mask)


def attend_padded(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Return the mixed values [B, T, H, K] of queries [B, H, T, K] over keys and values [B, H / G, L, K].

    Args:
        module: Of the attention.
        query: Whose weights over the keys, softmax(scaling * QK^T + mask + bias), are drawn to 0 with `dropout`.
        key: What they are compared with.
        value: What they mix.
        attention_mask: [B, 1, T, L], added to scores; None hides nothing.
        dropout: The chance of a weight to be 0.
        scaling: K ** -.5 where it is left out.
        position_bias: [1 or B, H, T, L], of the T5 family.
        others: What torch's kernel understands too, such as whether attention is causal, which the mask says here.
    """
    if key.shape[2] > _LONGEST:
        attended, _ = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            position_bias=position_bias,
            **others,
        )
        return attended, None
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = torch.matmul(query * (query.shape[3] ** -0.5 if scaling is None else scaling), key.transpose(2, 3))
    for added in (attention_mask, position_bias):
        if added is not None:
            scores += added
    weights = scores.softmax(dim=-1)
    if dropout:
        weights = F.dropout(weights, dropout)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), None
