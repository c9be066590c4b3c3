"""Where a run stands: the numbers that survive a checkpoint, and the record of one step."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from smolora.errors import ConfigError
from smolora.records.metrics_log import Scalar

_OF_THE_MOMENT = {"total_steps", "should_stop", "stop_reason", "phase", "kept_steps"}
"""A resumed run takes these from its own configuration and callbacks."""


@dataclass
class TrainerState:
    """The run's position. What a checkpoint needs of it is written to state.json."""

    total_steps: int = 0
    """Updates of the whole run."""

    step: int = 0
    """Updates done."""

    base_eval_loss: float | None = None
    """Evaluation loss before the first update, in nats a token."""

    best_eval_loss: float | None = None
    """Lowest evaluation loss so far, in nats a token."""

    best_step: int | None = None
    """The step that reached it."""

    should_stop: bool = False
    """Set by a callback to end the run: at the end of this step, or before the first one of a resumed run."""

    stop_reason: str | None = None
    """Why a callback ended it."""

    phase: int = 0
    """Number of the phase that the step at hand belongs to, from 1; 0 where there are none. A function of the step."""

    kept_steps: set[int] = field(default_factory=set)
    """Steps whose checkpoint is written and never pruned, such as the last one of a phase."""

    checksums: dict[str, int] = field(default_factory=dict)
    """CRC-32 of each trainable tensor before the first update, to prove at the end that it moved."""

    waiting: list[str] = field(default_factory=list)
    """Trainable tensors that the first update can't move: a factor beside them is still zero."""

    unevaluated: dict[str, Scalar] | None = None
    """The record of the step at hand until its evaluation is made: where a signal cut that short, a resumed run goes on
    with it."""

    @property
    def has_improved(self) -> bool:
        """Whether a held-out loss was lower than the one before the first update."""
        best, base = self.best_eval_loss, self.base_eval_loss
        return best is not None and base is not None and best < base

    def require_a_step(self) -> None:
        """Raise where a callback ends the run before its first update.

        Raises:
            ConfigError: So it is.
        """
        if self.should_stop and self.step == 0:
            held_out = f" at a held-out loss of {self.base_eval_loss:.4f}" if self.base_eval_loss is not None else ""
            raise ConfigError(
                f"{self.stop_reason or 'a callback ended the run'} before the first step{held_out}: there is nothing "
                "left to train for. Keep what you have, or ask for more before it may stop."
            )

    def take(self, eval_loss: float) -> None:
        """Remember the held-out loss of the step at hand if it is the lowest so far."""
        if self.best_eval_loss is None or eval_loss < self.best_eval_loss:
            self.best_eval_loss, self.best_step = eval_loss, self.step

    def to_dict(self) -> dict[str, object]:
        """Return what state.json holds."""
        return {name: value for name, value in asdict(self).items() if name not in _OF_THE_MOMENT}

    def restore(self, values: dict[str, object]) -> None:
        """Take the values of a state.json."""
        vars(self).update({name: values[name] for name in self.to_dict() if name in values})


@dataclass(frozen=True)
class StepRecord:
    """What one update measured."""

    step: int
    loss: float
    """Mean over the step's target tokens, in nats."""
    grad_norm: float
    """L2 norm before clipping."""
    learning_rate: float
    tokens: int
    """Target tokens."""
    input_tokens: int
    seconds: float
    phase: int = 0
    """Number of the phase from 1; 0 where there are none."""

    @property
    def tokens_per_second(self) -> float:
        """Input tokens over the step's own time."""
        return self.input_tokens / self.seconds

    def to_dict(self) -> dict[str, Scalar]:
        """Return the columns of metrics.jsonl."""
        return {
            "step": self.step,
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
            "tokens": self.tokens,
            "input_tokens": self.input_tokens,
            "tokens_per_second": self.tokens_per_second,
            "phase": self.phase,
        }
