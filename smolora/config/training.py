"""How a run learns: steps, rates, intervals. Names are Hugging Face's."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from smolora.config.base import Section
from smolora.errors import ConfigError

ScheduleName = Literal["linear", "cosine", "constant", "one_cycle"]


class TrainingConfig(Section):
    """Settings of the training loop."""

    learning_rate: float = Field(default=2e-4, ge=0.0, allow_inf_nan=False)
    """Peak learning rate of AdamW."""

    max_steps: int | None = Field(default=None, ge=1)
    """Optimiser updates. Where set it decides alone, and the data repeats; otherwise epochs do."""

    num_train_epochs: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    """Passes over the training rows, where `max_steps` isn't set."""

    per_device_train_batch_size: int = Field(default=8, ge=1)
    """Rows in one forward and backward pass on one device."""

    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Passes summed into one update; the loss is the token mean over all of them."""

    warmup_steps: float = Field(default=0.1, ge=0.0, allow_inf_nan=False)
    """Steps of linear warm-up; below 1, a fraction of all steps."""

    lr_scheduler_type: ScheduleName = "linear"
    """The curve after warm-up: linear or cosine to 0, constant, or one_cycle (cosine up, cosine down)."""

    weight_decay: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """Decoupled decay of AdamW, on tensors of two or more dimensions."""

    max_grad_norm: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    """Clip the gradient to this L2 norm; 0 turns clipping off."""

    logging_steps: int = Field(default=10, ge=1)
    """Write a line of metrics.jsonl every so many steps (the first and the last step always)."""

    save_steps: int = Field(default=100, ge=1)
    """Write a checkpoint every so many steps (the last step always)."""

    save_total_limit: int = Field(default=2, ge=1)
    """Checkpoints to keep, beside the one with the lowest evaluation loss."""

    eval_steps: int | None = Field(default=None, ge=1)
    """Evaluate on held-out rows every so many steps. Left out: five times in the run."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of initial weights, data order and dropout."""

    profile_steps: tuple[int, int] | None = None
    """First and last step to profile, written to profile.json in Chrome's trace format."""

    @model_validator(mode="after")
    def _profile_is_an_interval(self) -> TrainingConfig:
        if self.profile_steps and not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
            raise ValueError(f"profile_steps must be [first, last], 1 <= first <= last, found {self.profile_steps}")
        return self

    @property
    def rows_per_step(self) -> int:
        """Rows that one update sees on one device."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def with_rows_per_step(self, rows: int, num_processes: int = 1) -> TrainingConfig:
        """Return a copy whose updates see `rows` rows over all processes, at this accumulation."""
        size, remainder = divmod(rows, self.gradient_accumulation_steps * num_processes)
        if remainder or size < 1:
            over = f" on {num_processes} processes" if num_processes > 1 else ""
            raise ConfigError(
                f"training: {rows} rows a step can't be split evenly into "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} passes{over}."
            )
        copy: TrainingConfig = self.replace(per_device_train_batch_size=size)
        return copy
