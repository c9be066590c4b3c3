"""Training in mixed precision: products and attention in bfloat16; weights, norms, what blocks add up and the loss in
float32 (Micikevicius et al. 2018; Kalamkar et al. 2019, whose bfloat16 needs no scaling of the loss).

Legend: `B` rows, `T` tokens of each, `D` width, `H` heads, `K` head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from smolora.models.gpt import GPTModel, MultiHeadAttention, TransformerBlock
from smolora.models.row_attention import AttentionSettings, attend_rows
from smolora.models.rows import Rows
from smolora.models.structure import replaced_forward


@contextmanager
def mixed_precision(model: GPTModel) -> Iterator[None]:
    """Let `model` compute in mixed precision inside the block; its weights and its gradients are float32 as before.

    torch.autocast chooses the type of each operation. On a CPU attention goes by rows, as it does in tuning: torch's
    flash kernel takes ten times as long backward as forward there.
    """
    device = next(model.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(replaced_forward(model, torch.autocast(device.type, torch.bfloat16)(model.forward)))
        if device.type == "cpu":
            windows: dict[tuple[int, int], Rows] = {}
            for block in model.blocks:
                assert isinstance(block, TransformerBlock)
                stack.enter_context(replaced_forward(block.attention, _RowAttention(block.attention, windows)))
        yield


class _RowAttention:
    """What `MultiHeadAttention` computes: one product for queries, keys and values, and attention by rows."""

    def __init__(self, attention: MultiHeadAttention, windows: dict[tuple[int, int], Rows]) -> None:
        self._attention = attention
        self._windows = windows
        self._plain = attention.forward

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            return self._plain(x, mask)
        attention = self._attention
        (B, T, _), H = x.shape, attention.num_heads
        inputs = (attention.W_q, attention.W_k, attention.W_v)
        weight = torch.cat([layer.weight for layer in inputs])
        bias = None if attention.W_q.bias is None else torch.cat([layer.bias for layer in inputs])
        heads = F.linear(x, weight, bias).view(B * T, 3 * H, -1)
        dropout = attention.dropout.p if attention.training else 0.0
        settings = AttentionSettings(heads.shape[2] ** -0.5, dropout)
        mixed = attend_rows(heads, num_heads=H, rows=self._rows(B, T), settings=settings)
        output: Tensor = attention.dropout(attention.W_o(mixed.view(x.shape)))
        return output

    def _rows(self, num_rows: int, length: int) -> Rows:
        """Return rows of one length, made once for all layers and steps."""
        if (num_rows, length) not in self._windows:
            self._windows[num_rows, length] = Rows([length] * num_rows, torch.device("cpu"))
        return self._windows[num_rows, length]
