"""What makes a tuning step fast. The parts that are on by default stand for plain code with the same result, and each
can be switched off alone; the others choose which rows share a pass.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from smolora.config.base import Section


class SpeedConfig(Section):
    """Parts of the fast path. What a model can't take falls back to plain transformers and peft, and says why."""

    row_attention: bool = True
    """Attend row by row in groups of like length, with a backward pass of our own. Where batches are padded, attend by
    plain products in 16 bits on a CPU, up to 256 tokens."""

    fused_lora: bool = True
    """Compute the layers that read one input, and their adapters, as one function."""

    fused_blocks: bool = True
    """Fuse norm, rotary positions and gated MLP of the families whose profile is known; on a CUDA device with Liger's
    kernels for norms and gates where they are installed."""

    packed_weights: bool = True
    """Keep frozen bfloat16 weights in the layout the CPU's matrix units read, for two more copies of them in memory."""

    prefix_cache_gib: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """Disk space in the run's folder for what enters the lowest trained layer, so that later epochs of a phase skip the
    frozen layers below it. 0 turns it off; it needs every dropout off, adapter.lora_dropout too."""

    max_tokens_per_batch: int | None = Field(default=None, ge=1)
    """Put as many rows into a pass as fit into so many input tokens (best fit, none is split), instead of
    training.per_device_train_batch_size of them. The same rows share a pass in every epoch."""

    group_by_length: bool = False
    """Put rows of like length into one update: less padding where batches are padded, and a less random order."""

    @model_validator(mode="after")
    def _passes_are_made_one_way(self) -> SpeedConfig:
        if self.max_tokens_per_batch and self.group_by_length:
            raise ValueError("max_tokens_per_batch and group_by_length each say which rows share a pass: give one.")
        return self
