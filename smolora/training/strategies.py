"""Strategies: a learning-rate curve and listeners of the loop under one name.

`finetune(..., strategy=...)` and PEFTTrainer take one. On a Trainer made by hand, call
`strategy.prepare_trainer(trainer)` before `trainer.train()`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from smolora.config import RunConfig
from smolora.config.phases import PlateauConfig
from smolora.errors import ConfigError
from smolora.training.callback import Callback
from smolora.training.callbacks import PlateauRateCallback
from smolora.training.plateau import PlateauDetector

if TYPE_CHECKING:
    from smolora.training.trainer import Trainer

METRIC = "eval_loss"
"""What is asked about: the held-out loss, in nats a token."""


class TrainingStrategy:
    """The base, which changes nothing. Override what you need.

    Example:
        ```python
        class StopWhenGood(TrainingStrategy):
            def should_stop_early(self, metrics):
                return metrics["eval_loss"] < 1.0
        ```
    """

    needs_held_out: ClassVar[bool] = False
    """Whether it makes no sense without held-out rows."""

    def configure(self, config: RunConfig) -> RunConfig:
        """Return `config` with what of this strategy settings can say, so that the run's records say it."""
        return config

    def prepare_trainer(self, trainer: Trainer) -> None:
        """Give a trainer the curve and the listeners, before its first step.

        Raises:
            ConfigError: It needs held-out rows, and there are none.
        """
        self.require_held_out(is_evaluated=trainer.eval_dataset is not None)
        trainer.callbacks.append(_AskToStop(self))

    def should_stop_early(self, metrics: Mapping[str, float | None]) -> bool:
        """Say whether to stop; asked after each evaluation with `step` and `eval_loss`."""
        return False

    def require_held_out(self, *, is_evaluated: bool) -> None:
        """Raise where it needs held-out rows and there are none.

        Raises:
            ConfigError: So it is.
        """
        if self.needs_held_out and not is_evaluated:
            raise ConfigError(
                f"{type(self).__name__} looks at the held-out loss, and no rows are held out. Give an eval_dataset."
            )

    def reset(self) -> None:
        """A run is about to begin: forget the one before. What a resumed run has kept comes back after this."""

    def state_dict(self) -> Mapping[str, object]:
        """Return what must survive a resume, as JSON can hold it."""
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take back what `state_dict` returned."""


class AdaptiveLRStrategy(TrainingStrategy):
    """A cosine after a linear warm-up, lowered where the held-out loss has stopped falling.

    The same as `training.lr_scheduler_type=cosine evaluation.plateau_patience=N`.

    Args:
        warmup_steps: Steps of warm-up; below 1, a fraction of all steps.
        patience: Evaluations in a row without improvement.
        factor: What the rate is multiplied by then, for the rest of the run.
    """

    needs_held_out = True

    def __init__(self, *, warmup_steps: float = 0.1, patience: int = 2, factor: float = 0.5) -> None:
        self.warmup_steps = warmup_steps
        self.patience = patience
        self.factor = factor

    def configure(self, config: RunConfig) -> RunConfig:
        """Return `config` with the curve, and with what lowers it.

        Raises:
            ConfigError: A patience below 1, or a factor that isn't between 0 and 1.
        """
        training = config.training.replace(lr_scheduler_type="cosine", warmup_steps=self.warmup_steps)
        evaluation = config.evaluation.replace(plateau_patience=self.patience, plateau_factor=self.factor)
        changed: RunConfig = config.replace(training=training, evaluation=evaluation)
        return changed

    def prepare_trainer(self, trainer: Trainer) -> None:
        """Give a trainer the curve, and what lowers it unless its configuration has brought that.

        Raises:
            ConfigError: There are no held-out rows to see a plateau on.
        """
        super().prepare_trainer(trainer)
        trainer.use_schedule("cosine", warmup_steps=self.warmup_steps)
        if not any(isinstance(callback, PlateauRateCallback) for callback in trainer.callbacks):
            trainer.callbacks.append(PlateauRateCallback(self.patience, self.factor))


class EarlyStoppingStrategy(TrainingStrategy):
    """Stop after `patience` evaluations in a row whose loss isn't `threshold` below the best one.

    The same as `evaluation.early_stopping_patience=N evaluation.early_stopping_threshold=X`, and it can be asked
    about the metrics of a loop of your own.
    """

    needs_held_out = True

    def __init__(self, patience: int = 2, threshold: float = 0.0) -> None:
        self.plateau = PlateauConfig(patience=patience, threshold=threshold)
        self.reset()

    def configure(self, config: RunConfig) -> RunConfig:
        """Return `config` with the patience and the threshold."""
        stopping = {
            "early_stopping_patience": self.plateau.patience,
            "early_stopping_threshold": self.plateau.threshold,
        }
        changed: RunConfig = config.replace(evaluation=config.evaluation.replace(**stopping))
        return changed

    def reset(self) -> None:
        """Count from the start."""
        self._detector = PlateauDetector()

    def should_stop_early(self, metrics: Mapping[str, float | None]) -> bool:
        """Count one evaluation; metrics of a step, which have no `eval_` at all, decide nothing.

        A loss that isn't finite never improves.

        Raises:
            ConfigError: Metrics of an evaluation without `eval_loss`.
        """
        if METRIC not in metrics:
            if found := [name for name in metrics if name.startswith("eval_")]:
                raise ConfigError(f"early stopping looks at {METRIC}, and this evaluation gave {', '.join(found)}.")
            return False
        value = metrics[METRIC]
        return self._detector.is_reached(math.nan if value is None else value, self.plateau)

    def state_dict(self) -> Mapping[str, object]:
        """Return the best loss and the count."""
        return self._detector.to_state()

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take them back."""
        self._detector = PlateauDetector.from_state(state)  # type: ignore[arg-type]


class _AskToStop(Callback):
    """Asks a strategy after each evaluation, and keeps its state and its answer through a resume."""

    def __init__(self, strategy: TrainingStrategy) -> None:
        self.strategy = strategy
        self._has_stopped = False

    def reset(self) -> None:
        self._has_stopped = False
        self.strategy.reset()

    def on_train_begin(self, trainer: Trainer) -> None:
        self._stop(trainer)  # A run that was stopped is not trained further by resuming it.

    def on_evaluate(self, trainer: Trainer, eval_loss: float) -> None:
        self._has_stopped = self.strategy.should_stop_early({"step": trainer.state.step, METRIC: eval_loss})
        self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        if self._has_stopped:
            trainer.state.should_stop = True
            # A callback that the configuration brought may have said why already.
            trainer.state.stop_reason = trainer.state.stop_reason or f"{type(self.strategy).__name__} said so"

    def state_dict(self) -> Mapping[str, object]:
        return {"has_stopped": self._has_stopped, "strategy": dict(self.strategy.state_dict())}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        kept = state["strategy"]
        assert isinstance(kept, dict), "the checkpoint's manifest vouches for what state_dict wrote"
        self._has_stopped = bool(state["has_stopped"])
        self.strategy.load_state_dict(kept)
