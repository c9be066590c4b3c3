"""How a run learns: steps, rates, intervals. Names are Hugging Face's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from pydantic import Field, field_validator, model_validator

from smolora.config.base import Section
from smolora.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from transformers import TrainingArguments

ScheduleName = Literal["linear", "cosine", "constant", "one_cycle"]
TrackerName = Literal["tensorboard", "trackio", "wandb", "mlflow"]


class _Learning(Section):
    """What an update is."""

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
    """Decoupled decay of AdamW, on tensors of two or more dimensions, but for IA3's vectors, which rest at 1."""

    max_grad_norm: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    """Clip the gradient to this L2 norm; 0 turns clipping off."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of initial weights, data order and dropout."""


class TrainingConfig(_Learning):
    """Settings of the training loop."""

    logging_steps: int = Field(default=10, ge=1)
    """Write a line of metrics.jsonl every so many steps (the first and the last step always)."""

    save_steps: int = Field(default=100, ge=1)
    """Write a checkpoint every so many steps (the last step always)."""

    save_total_limit: int = Field(default=2, ge=1)
    """Checkpoints to keep, beside the one with the lowest evaluation loss."""

    eval_steps: int | None = Field(default=None, ge=1)
    """Evaluate on held-out rows every so many steps. Left out: five times in the run."""

    profile_steps: tuple[int, int] | None = None
    """First and last step to profile, written to profile.json in Chrome's trace format."""

    report_to: tuple[TrackerName, ...] = ()
    """Trackers that get the records of metrics.jsonl too: tensorboard, trackio, wandb, mlflow; several as a list, or
    with commas between them. Left out, or none: none."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        if value is None or value == "none":
            return ()
        names = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
        if not isinstance(names, list | tuple):
            return value
        for name in names:
            if name not in get_args(TrackerName):
                allowed = get_args(TrackerName)
                suggestion = did_you_mean(str(name), allowed)
                raise ValueError(f"no tracker {name!r}.{suggestion} Trackers: {', '.join(allowed)}; or none alone")
        return tuple(dict.fromkeys(names))

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
        parts = self.gradient_accumulation_steps * num_processes
        size, remainder = divmod(rows, parts)
        if remainder or size < 1:
            over = f" on {num_processes} processes" if num_processes > 1 else ""
            nearest = " or ".join(str(parts * number) for number in (size, max(size, 0) + 1) if number > 0)
            raise ConfigError(
                f"--batch-size: {rows} rows a step can't be split evenly into "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} passes{over}. Give {nearest}."
            )
        copy: TrainingConfig = self.replace(per_device_train_batch_size=size)
        return copy

    def to_training_arguments(self, output_dir: str | Path, **settings: object) -> TrainingArguments:
        """Return these settings as Hugging Face's; see `smolora.integrations.hf_arguments.to_training_arguments`."""
        from smolora.integrations.hf_arguments import to_training_arguments

        return to_training_arguments(self, output_dir, **settings)
