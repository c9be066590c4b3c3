"""What `smolora plan` says of a run, as plain numbers: work, memory in bytes, time in seconds. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from smolora.runtime.console import in_minutes


@dataclass(frozen=True)
class Work:
    """What the run does."""

    rows: int
    held_out_rows: int
    epoch_input_tokens: int
    epoch_target_tokens: int
    steps: int
    rows_per_step: int
    """Of a full step."""
    input_tokens: int
    """Of all steps."""
    longest_row: int
    """In tokens."""
    longest_step_tokens: int
    """Input tokens of the step with the most."""

    @property
    def tokens_per_step(self) -> float:
        """Mean input tokens of a step."""
        return self.input_tokens / self.steps


@dataclass(frozen=True)
class Memory:
    """Bytes, of the GPU where the run computes on one, else of the process."""

    available: int | None
    """What the run may hold; None if unknown."""
    peak: int | None
    """In the step that takes most. None where the trial ran out of memory, so it is more than there was."""
    typical_peak: int | None = None
    """In a step of middle size; None where it wasn't run."""

    @property
    def fits(self) -> bool:
        """Whether the run gets the memory it needs."""
        if self.peak is None:
            return False
        return self.available is None or self.peak <= self.available


@dataclass(frozen=True)
class Seconds:
    """Where the time of the run goes."""

    preparation: float
    """From the start of the process to the first step."""
    steps: float
    evaluations: float
    checkpoints: float
    verdict: float
    ending: float
    """The adapter, the report, and the end of the process."""

    @property
    def total(self) -> float:
        """Of the whole run."""
        return self.preparation + self.steps + self.evaluations + self.checkpoints + self.verdict + self.ending


@dataclass(frozen=True)
class Parts:
    """What parts of a step say of larger and smaller ones, where whole steps don't fit or would take minutes."""

    tokens: int
    """Input tokens of the largest part that stands for whole steps; 0 where none does."""
    pass_tokens: int
    """What the largest pass of the run holds, padding included."""
    bytes_per_token: float
    """What each further token of a pass adds to the peak; 0 where an evaluation before any step took too much."""


@dataclass(frozen=True)
class Estimate:
    """What to expect of a run. What isn't known because memory ran out is None."""

    memory: Memory
    work: Work | None = None
    seconds: Seconds | None = None
    parts: Parts | None = None
    """None where whole steps were run, and fit."""

    @property
    def tokens_per_second(self) -> float | None:
        """Input tokens over the steps' own time, as in metrics.jsonl."""
        return self.work.input_tokens / self.seconds.steps if self.work and self.seconds else None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Estimate:
        """Read what `asdict` wrote."""
        work, seconds, parts = values["work"], values["seconds"], values["parts"]
        return cls(
            Memory(**values["memory"]),
            Work(**work) if work else None,
            Seconds(**seconds) if seconds else None,
            Parts(**parts) if parts else None,
        )

    def to_dict(self) -> dict[str, object]:
        """Return what `plan --json` prints of it."""
        work = self.work and {**asdict(self.work), "tokens_per_step": self.work.tokens_per_step}
        seconds = self.seconds and {
            **asdict(self.seconds),
            "total": self.seconds.total,
            "per_step": self.seconds.steps / self.work.steps if self.work else None,
        }
        memory = {**asdict(self.memory), "fits": self.memory.fits}
        parts = self.parts and asdict(self.parts)
        speed = self.tokens_per_second
        return {"work": work, "memory": memory, "seconds": seconds, "tokens_per_second": speed, "parts": parts}

    def describe(self) -> str:
        """Return a few lines for a person."""
        parts = [self.work and self._describe_work(self.work)]
        if self.work and self.seconds:
            parts.append(self._describe_time(self.work, self.seconds))
        parts.append(f"memory: {self.describe_memory()}")
        if self.parts and self.parts.tokens:
            parts.append(
                f"measured: parts of a step, of up to {self.parts.tokens:,} tokens; the rest follows from them"
            )
        return "\n".join(part for part in parts if part)

    def _describe_work(self, work: Work) -> str:
        return (
            f"rows: {work.rows:,}, and {work.held_out_rows:,} held out; an epoch has {work.epoch_input_tokens:,} input "
            f"tokens and {work.epoch_target_tokens:,} target tokens\n"
            f"steps: {work.steps:,} of {work.rows_per_step} rows; {work.tokens_per_step:,.0f} input tokens a step, "
            f"{work.longest_step_tokens:,} in the longest"
        )

    def _describe_time(self, work: Work, seconds: Seconds) -> str:
        return (
            f"speed: {self.tokens_per_second:,.0f} input tokens/s, {seconds.steps / work.steps:.3g} s a step\n"
            f"time: {in_minutes(seconds.total)} (start {in_minutes(seconds.preparation)}, steps "
            f"{in_minutes(seconds.steps)}, evaluations {in_minutes(seconds.evaluations)}, checkpoints "
            f"{in_minutes(seconds.checkpoints)}, verdict {in_minutes(seconds.verdict)}, report "
            f"{in_minutes(seconds.ending)})"
        )

    def describe_memory(self) -> str:
        """Return what is needed and what is there."""
        memory = self.memory
        there = (
            "nobody knows how much is there" if memory.available is None else f"{in_mib(memory.available)} are there"
        )
        if memory.peak is None:
            return f"more than there is in the largest step; {there}"
        typical = f"{in_mib(memory.typical_peak)} in a typical step, " if memory.typical_peak else ""
        return f"{typical}{in_mib(memory.peak)} in the largest; {there}"


def in_mib(size: int) -> str:
    """Return bytes in words.

    >>> in_mib(3 << 29)
    '1,536 MiB'
    """
    return f"{size / 2**20:,.0f} MiB"
