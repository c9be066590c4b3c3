"""What makes a tuning step fast. Each part stands for plain code with the same result and can be switched off alone."""

from __future__ import annotations

from smolora.config.base import Section


class SpeedConfig(Section):
    """Parts of the fast path. What a model can't take falls back to plain transformers and peft, and says why."""

    row_attention: bool = True
    """Attend row by row in groups of like length, with a backward pass of our own; packed batches only."""

    fused_lora: bool = True
    """Compute the layers that read one input, and their adapters, as one function."""

    fused_blocks: bool = True
    """Fuse norm, rotary positions and gated MLP of the families whose profile is known."""

    packed_weights: bool = True
    """Keep frozen bfloat16 weights in the layout the CPU's matrix units read, for two more copies of them in memory."""
