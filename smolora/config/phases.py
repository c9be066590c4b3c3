"""What trains when: phases of a run, each a choice of tensors and the moment it starts.

Only starts are stored: a phase ends where the next one begins, so there can be no gap and no overlap.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from pydantic import Field, field_validator, model_validator

from smolora.config.base import Section
from smolora.errors import ConfigError, count_of, did_you_mean

StrategyName = Literal["both,mlp,attn", "attn,mlp,both", "both,mlp,both", "early,late"]
PhaseGroup = Literal["attention", "mlp", "embedding", "head", "norm", "other"]
LearningRateChoice = Literal["continue", "restart"]
MomentsChoice = Literal["keep", "reset"]

_ARROWS = ("->", "=>", "→", "⟶", "➜", "⇒")


class PlateauConfig(Section):
    """A number that has stopped falling. The step where it did is recorded, so a resumed run needs no second look."""

    metric: Literal["eval_loss", "loss"] = "eval_loss"
    """eval_loss is measured at each evaluation, loss at each step."""

    patience: int = Field(default=2, ge=1)
    """Measurements in a row without improvement, counted from the start of the phase before."""

    threshold: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """How much lower it must be to count as improvement, in nats a token."""


class PhaseStart(Section):
    """When a phase begins; exactly one of these."""

    step: int | None = Field(default=None, ge=0)
    """Updates done before it."""

    fraction: float | None = Field(default=None, ge=0.0, lt=1.0)
    """Share of all updates done before it."""

    epoch: float | None = Field(default=None, ge=0.0, allow_inf_nan=False)
    """Passes over the data done before it."""

    plateau: PlateauConfig | None = None
    """It begins when this is reached in the phase before; if it never is, that one goes on to the end."""

    @model_validator(mode="after")
    def _exactly_one(self) -> PhaseStart:
        given = [name for name in type(self).model_fields if self.__dict__[name] is not None]
        if len(given) != 1:
            raise ValueError(f"step, fraction, epoch, plateau: give exactly one, found {', '.join(given) or 'none'}")
        return self


class PhaseConfig(Section):
    """One phase: which tensors of the adapter it trains, and how it begins. Every condition that is given must hold."""

    groups: tuple[PhaseGroup, ...] = ()
    """Groups of modules. Left out: all."""

    layers: tuple[int, int] | Literal["early", "late"] | None = None
    """First and last layer, from 0, or the early or late half. Left out: all, and what is outside of the layers."""

    matrices: Literal["A", "B"] | None = None
    """Only one of LoRA's two matrices. Left out: both."""

    pattern: str | None = Field(default=None, min_length=1)
    """A shell pattern for the whole path of a module, such as *.q_proj."""

    start: PhaseStart | None = None
    """When it begins; a bare number is a step. The first phase begins the run. Left out of all: equal shares."""

    learning_rate: LearningRateChoice | None = None
    """continue or restart; left out, as `phases.learning_rate` says."""

    moments: MomentsChoice | None = None
    """keep or reset; left out, as `phases.moments` says."""

    @field_validator("groups", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("start", mode="before")
    @classmethod
    def _bare_step(cls, value: object) -> object:
        return {"step": value} if isinstance(value, int) else value

    @field_validator("layers")
    @classmethod
    def _layers_are_a_range(
        cls, value: tuple[int, int] | Literal["early", "late"] | None
    ) -> tuple[int, int] | Literal["early", "late"] | None:
        if isinstance(value, tuple) and not 0 <= value[0] <= value[1]:
            raise ValueError("give [first, last] with 0 <= first <= last")
        return value


class DynamicLoRAConfig(Section):
    """Phases of a run. Off, as long as nothing here is set."""

    enabled: bool | None = None
    """Left out, on where a strategy, a table or an end is set. On without any of them: both,mlp,attn."""

    strategy: StrategyName | None = None
    """both,mlp,attn, attn,mlp,both, both,mlp,both or early,late; arrows may stand for the commas."""

    phase1_end: int | None = Field(default=None, ge=1)
    """Last update of a strategy's first phase. Left out with `phase2_end`: equal shares of the run."""

    phase2_end: int | None = Field(default=None, ge=2)
    """Last update of a strategy's second phase."""

    table: tuple[PhaseConfig, ...] = ()
    """Phases of your own, in order, in place of a strategy."""

    end: int | None = Field(default=None, ge=1)
    """Updates of the run that the phases were written for; one of another length is refused. Left out: any."""

    learning_rate: LearningRateChoice = "continue"
    """continue: one curve over the whole run. restart: each phase has its own, with a warm-up."""

    warmup_steps: float = Field(default=0.1, ge=0.0, allow_inf_nan=False)
    """Warm-up of a curve that restarts, in steps; below 1, a fraction of the phase."""

    moments: MomentsChoice = "keep"
    """keep: a tensor goes on with the optimiser's moments from when it was frozen. reset: it begins without."""

    @field_validator("strategy", mode="before")
    @classmethod
    def _normalise(cls, value: object) -> object:
        return normalise_strategy(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _is_one_plan(self) -> DynamicLoRAConfig:
        if self.table and (self.strategy or self.phase1_end or self.phase2_end):
            raise ValueError("give a strategy with its ends, or a table with starts, not both")
        if self.is_on:
            _require_order(self.phases)
        return self

    def find_idle(self) -> Mapping[str, str]:
        """Return what waits for phases, unless they are switched off."""
        names = () if self.is_on or self.enabled is False else ("learning_rate", "warmup_steps", "moments")
        return dict.fromkeys(names, "a strategy or a table")

    @property
    def is_on(self) -> bool:
        """Whether the run has phases."""
        if self.enabled is not None:
            return self.enabled
        return any((self.strategy, self.table, self.phase1_end, self.phase2_end))

    @property
    def phases(self) -> tuple[PhaseConfig, ...]:
        """The phases in order, those of a strategy spelt out; empty where there are none."""
        if not self.is_on:
            return ()
        if self.table:
            return self.table
        phases = _STRATEGIES[self.strategy or "both,mlp,attn"]
        ends = [self.phase1_end, self.phase2_end][: len(phases) - 1]
        if len(phases) == 2 and self.phase2_end:
            raise ConfigError(
                f"phase2_end: early,late has two phases, and the second ends with the run, found {self.phase2_end}"
            )
        if not any(ends):
            return phases
        if None in ends:
            raise ConfigError("phase1_end, phase2_end: a strategy of three phases takes both or none")
        if self.phase1_end and self.phase2_end and self.phase2_end <= self.phase1_end:
            raise ConfigError(f"phase2_end: must come after phase1_end={self.phase1_end}, found {self.phase2_end}")
        starts = [None, *(PhaseStart(step=end) for end in ends)]
        return tuple(phase.replace(start=start) for phase, start in zip(phases, starts, strict=True))


_BOTH, _MLP, _ATTENTION = (PhaseConfig(groups=groups) for groups in (("attention", "mlp"), ("mlp",), ("attention",)))
_STRATEGIES: dict[StrategyName, tuple[PhaseConfig, ...]] = {
    "both,mlp,attn": (_BOTH, _MLP, _ATTENTION),
    "attn,mlp,both": (_ATTENTION, _MLP, _BOTH),
    "both,mlp,both": (_BOTH, _MLP, _BOTH),
    "early,late": (PhaseConfig(layers="early"), PhaseConfig(layers="late")),
}


def normalise_strategy(text: str) -> str:
    """Return the name of a strategy that may be spelt with arrows and spaces.

    >>> normalise_strategy("both -> MLP → attention")
    'both,mlp,attn'

    Raises:
        ValueError: There is none of that name.
    """
    for arrow in _ARROWS:
        text = text.replace(arrow, ",")
    words = [word.strip().lower() for word in text.split(",")]
    name = ",".join("attn" if word == "attention" else word for word in words)
    if name not in get_args(StrategyName):
        allowed = get_args(StrategyName)
        raise ValueError(f"there is no such strategy.{did_you_mean(name, allowed)} Strategies: {'; '.join(allowed)}")
    return name


def resolve_starts(
    phases: Sequence[PhaseConfig], *, total_steps: int, steps_per_epoch: int, recorded: Sequence[int | None] = ()
) -> list[int | None]:
    """Return the updates done before each phase; None for a plateau that hasn't been reached.

    Args:
        phases: In order.
        total_steps: Updates of the run.
        steps_per_epoch: Updates of one pass over the data.
        recorded: What an earlier part of the same run resolved; it stays, whatever the run's length has become.

    Raises:
        ConfigError: A phase would have no update, because the next one, or the end of the run, comes first.
    """
    starts = list(recorded) or [
        _resolve_start(phase.start, number, len(phases), total_steps, steps_per_epoch)
        for number, phase in enumerate(phases)
    ]
    known = [(number, start) for number, start in enumerate(starts, start=1) if start is not None]
    if total_steps < len(known):
        raise ConfigError(
            f"phases: a run of {count_of(total_steps, 'step')} can't hold {len(known)} phases, since each "
            f"needs an update at least. Train for {len(known)} steps or more, or with fewer phases."
        )
    for (number, start), (following, end) in itertools.pairwise([*known, (len(phases) + 1, total_steps)]):
        if start >= end:
            ends = f"phase {following} starts there" if following <= len(phases) else f"the run has {total_steps}"
            raise ConfigError(
                f"phases: phase {number} starts after {start} updates and would have none, since {ends}"
                f"{f' after {end}' if following <= len(phases) else ''}. Start it earlier, or train longer."
            )
    return starts


def _resolve_start(
    start: PhaseStart | None, index: int, num_phases: int, total_steps: int, steps_per_epoch: int
) -> int | None:
    if start is None:
        return index * total_steps // num_phases
    if start.step is not None:
        return start.step
    if start.fraction is not None:
        return round(start.fraction * total_steps)
    return None if start.epoch is None else round(start.epoch * steps_per_epoch)


def _require_order(phases: Sequence[PhaseConfig]) -> None:
    """Raise where no run could have these phases; what depends on its length is said by `resolve_starts`."""
    first, *later = (phase.start for phase in phases)
    if first is not None and first not in (PhaseStart(step=0), PhaseStart(fraction=0.0), PhaseStart(epoch=0.0)):
        raise ConfigError("table.0.start: the first phase begins with the run; leave its start away, or set it to 0")
    given = [start for start in later if start is not None]
    if given and len(given) < len(later):
        missing = next(number for number, start in enumerate(later, start=1) if start is None)
        raise ConfigError(f"table.{missing}.start is missing: give every later phase a start, or none of them")
    for number, (before, after) in enumerate(itertools.pairwise(given), start=2):
        if before.plateau and not after.plateau:
            raise ConfigError(
                f"table.{number}.start: after a phase that starts at a plateau, only a plateau can follow"
            )
        _require_later(before, after, number)
    if given and given[0].step == 0:
        raise ConfigError("table.1.start: phase 1 would have no update; start phase 2 after at least 1")


def _require_later(before: PhaseStart, after: PhaseStart, number: int) -> None:
    for kind in ("step", "fraction", "epoch"):
        earlier, later = before.__dict__[kind], after.__dict__[kind]
        if earlier is not None and later is not None and later <= earlier:
            raise ConfigError(
                f"table.{number}.start: phase {number + 1} starts at {kind} {later}, which doesn't come after "
                f"{kind} {earlier}, where phase {number} starts"
            )
