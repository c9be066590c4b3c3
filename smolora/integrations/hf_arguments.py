"""TrainingConfig for Hugging Face's Trainer: its arguments, and our learning-rate curve on it.

Their warm-up starts at a rate of 0, which spends an update on nothing, and they have no one_cycle; no argument changes
that, so the exact curve is a callback.
"""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from smolora.config import TrainingConfig
from smolora.training.schedules import ScheduleWindow

logger = logging.getLogger(__name__)

_CURVES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup", "one_cycle": "cosine"}
"""The nearest of Hugging Face's."""

_SAME = (
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "seed",
)
"""Fields that mean the same there."""

_NAMES = {field.name for field in fields(TrainingArguments)}
_CHECKPOINTING = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in _NAMES)
"""The newer name warns where it is called by the older one, and the oldest versions that we take know only that."""


def to_training_arguments(config: TrainingConfig, output_dir: str | Path, **settings: object) -> TrainingArguments:
    """Return the arguments with which Hugging Face's Trainer does what `config` says, as far as it can.

    `profile_steps` has no counterpart; `eval_steps` left out evaluates never, as they don't know the number of steps
    yet; the learning rate has their warm-up. A line of the log says which of these matters. For the exact curve, add
    `to_trainer_callback(config)`.

    Args:
        config: What to translate.
        output_dir: Their folder of checkpoints.
        **settings: Further arguments of theirs, which win.

    Example:
        ```python
        import transformers

        rows = [{"input_ids": input_ids[0], "labels": input_ids[0]}] * 8
        config = TrainingConfig(max_steps=100)
        args = config.to_training_arguments("out")
        trainer = transformers.Trainer(model=model, args=args, train_dataset=rows)
        trainer.add_callback(to_trainer_callback(config))
        trainer.train()
        ```
    """
    for reason in _find_losses(config):
        logger.warning("Hugging Face's arguments can't say it: %s", reason)
    values: dict[str, object] = {
        **{name: vars(config)[name] for name in _SAME},
        "max_steps": config.max_steps or -1,
        "lr_scheduler_type": _CURVES[config.lr_scheduler_type],
        "report_to": list(config.report_to) or "none",
        "eval_strategy": "no" if config.eval_steps is None else "steps",
        "eval_steps": config.eval_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # It would log 0 for a loss that isn't finite.
        _CHECKPOINTING: config.gradient_checkpointing,
        f"{_CHECKPOINTING}_kwargs": {"use_reentrant": False},
    }
    return TrainingArguments(output_dir=str(output_dir), **{**values, **settings})


def _find_losses(config: TrainingConfig) -> list[str]:
    """Return what is lost in translation."""
    found = []
    if config.profile_steps is not None:
        found.append("training.profile_steps has no counterpart, and nothing is profiled.")
    if config.lr_scheduler_type == "one_cycle":
        found.append("one_cycle is cosine with their warm-up; add to_trainer_callback(config) for the curve itself.")
    return found


class LearningRateCurve(TrainerCallback):  # type: ignore[misc]
    """Gives the scheduler of Hugging Face's Trainer our curve, before its first update."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: Optimizer,
        lr_scheduler: LambdaLR,
        **_: object,
    ) -> None:
        window = ScheduleWindow.over(0, state.max_steps, warmup_steps=self.config.warmup_steps)
        name = self.config.lr_scheduler_type
        lr_scheduler.lr_lambdas = [lambda step: window.factor(name, step) for _ in lr_scheduler.base_lrs]
        rates = [peak * window.factor(name, lr_scheduler.last_epoch) for peak in lr_scheduler.base_lrs]
        lr_scheduler._last_lr = rates
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
