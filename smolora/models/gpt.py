"""A GPT, whole and on one page: the GPT-2 architecture (Radford et al. 2019), written to be read.

Token ids go in, logits over the vocabulary come out. Pre-norm blocks, learned positions, GELU, and a head that shares
the embedding's weight. The one surprising fact: rows can be laid end to end without padding. `position_ids` that
restart at 0 mark where a row begins, and no token then attends across that border.

Shapes: `B` batch, `T` time (tokens in a row), `D` width, `H` heads, `K` head width (D = H * K), `V` vocabulary, `N`
chosen positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smolora.config.model import GPTConfig
from smolora.errors import ConfigError, DataError


class MultiHeadAttention(nn.Module):
    """Causal self-attention: every token gathers from itself and from the tokens before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.W_q = nn.Linear(config.width, config.width, bias=config.bias)
        self.W_k = nn.Linear(config.width, config.width, bias=config.bias)
        self.W_v = nn.Linear(config.width, config.width, bias=config.bias)
        self.W_o = nn.Linear(config.width, config.width, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix the tokens of `x` [B, T, D].

        `mask` [B, 1, T, T] is True where a query may read a key; None is plain causal.
        """
        q, k, v = (self._split_heads(project(x)) for project in (self.W_q, self.W_k, self.W_v))  # each [B, H, T, K]
        y = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=self.dropout.p if self.training else 0.0
        )  # softmax(q @ k.T / sqrt(K)) @ v: [B, H, T, K]
        y = y.transpose(1, 2).flatten(2)  # [B, T, D]
        output: Tensor = self.dropout(self.W_o(y))
        return output

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)  # [B, T, D] to [B, H, T, K]


class FeedForward(nn.Module):
    """Two linear layers around a GELU, four times as wide in the middle; each token on its own."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.linear1 = nn.Linear(config.width, 4 * config.width, bias=config.bias)
        self.gelu = nn.GELU(approximate="tanh" if config.activation == "gelu_new" else "none")
        self.linear2 = nn.Linear(4 * config.width, config.width, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Transform `x` [B, T, D] to [B, T, D]."""
        output: Tensor = self.dropout(self.linear2(self.gelu(self.linear1(x))))
        return output


class TransformerBlock(nn.Module):
    """Attention, then feed-forward; each reads a normalised copy of the residual stream and adds to it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(config.width, bias=config.bias)
        self.attention = MultiHeadAttention(config)
        self.ln2 = nn.LayerNorm(config.width, bias=config.bias)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Transform the residual stream `x` [B, T, D] to [B, T, D]."""
        h = x + self.attention(self.ln1(x), mask)
        y: Tensor = h + self.feed_forward(self.ln2(h))
        return y


class GPTModel(nn.Module):
    """The language model: embeddings, blocks, a final norm, and a head tied to the token embedding.

    >>> model = GPTModel(GPTConfig(num_layers=1, num_heads=2, width=8, context=16, vocab_size=10))
    >>> model(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 10])
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ConfigError(
                "gpt.vocab_size: a model needs it; take the tokenizer's, with config.replace(vocab_size=...)."
            )
        self.config = config
        self.gradient_checkpointing = False
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))
        self.ln_final = nn.LayerNorm(config.width, bias=config.bias)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.lm_head.weight = self.token_embedding.weight
        self.init_weights()

    def init_weights(self) -> None:
        """Draw GPT-2's initial weights from torch's global generator.

        =============================  ===========================================================
        every weight                   normal, std 0.02
        W_o and linear2                normal, std 0.02 / sqrt(2 L): 2 L branches add to the stream
        biases                         0
        norms                          scale 1, shift 0
        =============================  ===========================================================
        """
        residual_std = 0.02 / (2 * self.config.num_layers) ** 0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=residual_std if name.endswith(("W_o", "linear2")) else 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, target_positions: Tensor | None = None
    ) -> Tensor:
        """Return the logits of the token that follows each position.

        Args:
            input_ids: [B, T].
            position_ids: [B, T], restarting at 0 where a packed row begins. None: every row is one text.
            target_positions: [N] flat indices into B * T; the head runs on these positions only.

        Returns:
            [B, T, V], or [N, V] with `target_positions`.

        Raises:
            DataError: A row is longer than the context, or a position isn't in it.
        """
        x = self.features(input_ids, position_ids)  # [B, T, D]
        if target_positions is not None:
            x = x.flatten(0, 1)[target_positions]  # [N, D]
        logits: Tensor = self.lm_head(x)
        return logits

    def features(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Return what the head reads [B, T, D]: everything but the head.

        Args:
            input_ids: [B, T].
            position_ids: [B, T], as in `forward`.

        Raises:
            DataError: A row is longer than the context, or a position isn't in it.
        """
        if input_ids.shape[1] > self.config.context and position_ids is None:
            raise DataError(f"{input_ids.shape[1]} tokens in a row, but the model reads at most {self.config.context}.")
        mask = None if position_ids is None else block_diagonal_mask(position_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)  # [T]
        x = self.dropout(self.token_embedding(input_ids) + self._embed_positions(position_ids))
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask)
        features: Tensor = self.ln_final(x)
        return features

    def _embed_positions(self, position_ids: Tensor) -> Tensor:
        try:
            embedded: Tensor = self.position_embedding(position_ids)
        except IndexError:  # Of a CPU: to look at a GPU's numbers beforehand would wait for it in every pass.
            first, last = position_ids.min().item(), position_ids.max().item()
            raise DataError(
                f"position_ids go from {first} to {last}, but the model has positions 0 to {self.config.context - 1}."
            ) from None
        return embedded

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, bool] | None = None) -> None:
        """Recompute each block's activations in the backward pass: less memory, about a third more time.

        Called as transformers' models are; the only kind here is the non-reentrant one.
        """
        assert not (gradient_checkpointing_kwargs or {}).get("use_reentrant"), "reentrant checkpointing is not offered"
        self.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations for the backward pass again."""
        self.gradient_checkpointing = False

    def save_pretrained(self, folder: Path | str, *, eos_token_id: int | None = None) -> None:
        """Write a GPT-2 checkpoint (safetensors and config.json) that plain transformers loads with equal logits."""
        from smolora.models.gpt2_weights import save_gpt2  # Imported here: it imports GPTModel, and transformers.

        save_gpt2(self, Path(folder), eos_token_id=eos_token_id)

    @classmethod
    def from_pretrained(cls, folder: Path | str, *, dropout: float | None = None) -> Self:
        """Read a GPT-2 checkpoint: ours, or OpenAI's. `dropout` replaces the file's.

        Raises:
            ModelError: There is none, or what it computes isn't what this model does.
        """
        from smolora.models.gpt2_weights import load_gpt2

        return load_gpt2(cls, Path(folder), dropout=dropout)


def block_diagonal_mask(position_ids: Tensor) -> Tensor:
    """Return [B, 1, T, T], True where a query may read a key: not after it, and in the same packed row.

    >>> block_diagonal_mask(torch.tensor([[0, 1, 0]])).int().tolist()
    [[[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]]
    """
    starts = position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1  # [B, T]
    row = starts.cumsum(1)  # [B, T]: the number of the row that holds the token
    same_row = row[:, :, None] == row[:, None, :]  # [B, T, T]
    return same_row.tril()[:, None]
