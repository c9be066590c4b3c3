"""Callbacks that every run can use: early stopping, a lower rate on a plateau, a profile, and lines for people."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch.profiler import profile

from smolora.config.phases import PlateauConfig
from smolora.errors import count_of
from smolora.runtime.console import in_minutes, print_plainly
from smolora.training.callback import Callback
from smolora.training.plateau import PlateauDetector

if TYPE_CHECKING:
    from smolora.training.state import StepRecord
    from smolora.training.trainer import Trainer

logger = logging.getLogger(__name__)


class EarlyStoppingCallback(Callback):
    """Stop after `patience` evaluations in a row whose loss is not `threshold` below the best one.

    It listens to evaluations alone, so a step without one never counts, and a loss that isn't finite never improves.
    """

    def __init__(self, patience: int = 1, threshold: float = 0.0) -> None:
        self.plateau = PlateauConfig(patience=patience, threshold=threshold)
        self.reset()

    def reset(self) -> None:
        self._detector = PlateauDetector()

    def on_train_begin(self, trainer: Trainer) -> None:
        self._decide(trainer)  # A run that was stopped is not trained further by resuming it.

    def on_evaluate(self, trainer: Trainer, eval_loss: float) -> None:
        self._detector.is_reached(eval_loss, self.plateau)
        self._decide(trainer)

    def _decide(self, trainer: Trainer) -> None:
        count = self._detector.without_improvement
        if count >= self.plateau.patience:
            trainer.state.should_stop = True
            trainer.state.stop_reason = f"the held-out loss has not improved for {count_of(count, 'evaluation')}"

    def state_dict(self) -> Mapping[str, object]:
        return {"best": self._detector.best, "evaluations_without_improvement": self._detector.without_improvement}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        best, count = state["best"], state["evaluations_without_improvement"]
        assert isinstance(best, float | None), "the checkpoint's manifest vouches for what state_dict wrote"
        assert isinstance(count, int), "the checkpoint's manifest vouches for what state_dict wrote"
        self._detector = PlateauDetector(best, count)


class PlateauRateCallback(Callback):
    """Multiply the learning rate by `factor` after `patience` evaluations in a row that are not below the best one.

    It counts anew from there, and the rate stays lowered for the rest of the run, through a resume too.
    """

    def __init__(self, patience: int = 2, factor: float = 0.5) -> None:
        self.plateau = PlateauConfig(patience=patience)
        self.factor = factor
        self.reset()

    def reset(self) -> None:
        self._detector = PlateauDetector()
        self._scale = 1.0

    @property
    def learning_rate_factor(self) -> float:
        """What every plateau so far has made of the rate."""
        return self._scale

    def on_evaluate(self, trainer: Trainer, eval_loss: float) -> None:
        if self._detector.is_reached(eval_loss, self.plateau):
            self._detector.without_improvement = 0
            self._scale *= self.factor
            if trainer.state.step < trainer.state.total_steps:  # After the last update there is no rate to speak of.
                logger.info(
                    "step %d: no held-out loss below %.4f in %s; the rate is now %.3g of its curve",
                    trainer.state.step,
                    self._detector.best,
                    count_of(self.plateau.patience, "evaluation"),
                    self._scale,
                )

    def state_dict(self) -> Mapping[str, object]:
        return {"detector": self._detector.to_state(), "scale": self._scale}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        detector, scale = state["detector"], state["scale"]
        assert isinstance(detector, dict), "the checkpoint's manifest vouches for what state_dict wrote"
        assert isinstance(scale, float), "the checkpoint's manifest vouches for what state_dict wrote"
        self._detector, self._scale = PlateauDetector.from_state(detector), scale


class ProfileCallback(Callback):
    """Profile the steps from `first` to `last` and write a trace that chrome://tracing and Perfetto open."""

    def __init__(self, steps: tuple[int, int], path: Path) -> None:
        self.first, self.last = steps
        self.path = path
        self._profile: profile | None = None

    def on_step_begin(self, trainer: Trainer) -> None:
        if self._profile is None and self.first <= trainer.state.step + 1 <= self.last:
            self._profile = profile(profile_memory=True, record_shapes=True)
            self._profile.start()

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        if record.step == self.last:
            self._finish()

    def on_train_end(self, trainer: Trainer) -> None:
        self._finish()

    def _finish(self) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile.export_chrome_trace(str(self.path))
            self._profile = None


class EvaluationTimeCallback(Callback):
    """Say at the end of a run that evaluations took over half as long as its updates, if `least_seconds` at least."""

    def __init__(self, least_seconds: float = 10.0) -> None:
        self.least_seconds = least_seconds
        self.reset()

    def reset(self) -> None:
        self._updating = self._evaluating = 0.0

    def on_train_begin(self, trainer: Trainer) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        self._updating += record.seconds
        self._began = time.perf_counter()

    def on_evaluate(self, trainer: Trainer, eval_loss: float) -> None:
        self._evaluating += time.perf_counter() - self._began

    def on_finish(self, trainer: Trainer) -> None:
        if trainer.eval_dataset and self._evaluating > max(self.least_seconds, self._updating / 2):
            logger.info(
                "evaluations took %s beside %s of updates: data.max_validation_rows below %d makes them shorter",
                in_minutes(self._evaluating),
                in_minutes(self._updating),
                len(trainer.eval_dataset),
            )


_WIDTH_FOR_A_BAR = 110
"""Columns of a terminal; a narrower one has room for the numbers only."""


class ProgressCallback(Callback):
    """One live line on a terminal; elsewhere a plain line per logged step."""

    def __init__(self, console: Console) -> None:
        self.console = console
        bar = [BarColumn(bar_width=20)] if console.width >= _WIDTH_FOR_A_BAR else []
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            *bar,
            TextColumn("{task.fields[facts]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=1, facts="")
        self._eval_loss: float | None = None
        self._started, self._first_step = 0.0, 0

    def on_train_begin(self, trainer: Trainer) -> None:
        self._started, self._first_step = 0.0, trainer.state.step
        self._progress.update(self._task, total=trainer.state.total_steps, completed=trainer.state.step)
        self._progress.start()

    def on_step_begin(self, trainer: Trainer) -> None:
        self._started = self._started or time.perf_counter()  # Only now: the evaluation of the base comes once.

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        self._progress.update(self._task, completed=record.step, facts=self._describe(trainer, record))

    def on_log(self, trainer: Trainer, record: StepRecord) -> None:
        if not self.console.is_terminal:
            facts = f"{self._describe(trainer, record)}  lr {record.learning_rate:.1e}"
            self._print(f"step {record.step:>6}/{trainer.state.total_steps}  {facts}")

    def on_evaluate(self, trainer: Trainer, eval_loss: float) -> None:
        self._eval_loss = eval_loss
        is_lowest = trainer.state.best_step == trainer.state.step and trainer.state.has_improved
        best = "  (lowest so far)" if is_lowest else ""
        self._print(f"step {trainer.state.step:>6}  held-out loss {eval_loss:.4f}{best}")

    def on_train_end(self, trainer: Trainer) -> None:
        self._progress.stop()
        if trainer.state.stop_reason:
            self._print(f"stopped at step {trainer.state.step}: {trainer.state.stop_reason}")

    def _describe(self, trainer: Trainer, record: StepRecord) -> str:
        held_out = f"  held-out {self._eval_loss:.3f}" if self._eval_loss is not None else ""
        seconds_a_step = (time.perf_counter() - self._started) / max(1, record.step - self._first_step)
        left = in_minutes(seconds_a_step * (trainer.state.total_steps - record.step))
        speed = f"{record.tokens_per_second:,.0f} tokens/s"
        return f"loss {record.loss:.3f}{held_out}  {speed}  ETA {left}"

    def _print(self, line: str) -> None:
        print_plainly(self.console, line)
