"""`smolora plan`: what a run will take, measured before it, and where it doesn't fit, the nearest one that does.

The trial runs in a child process, so that its peak of memory is the run's and not this process's. No torch here: it
would take 250 MiB that the run has.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from smolora import errors
from smolora.config import ExperimentConfig
from smolora.recipes.estimate import Estimate, Memory, Work
from smolora.records.run_dir import RunDir
from smolora.records.staging import write_json
from smolora.runtime.available_memory import split_update
from smolora.runtime.signals import deferred_signals

logger = logging.getLogger(__name__)

_GLANCE = 0.1
"""Seconds between two looks for a signal."""

REQUEST, RESULT = "request.json", "result.json"

_ROWS, _PASSES = "training.per_device_train_batch_size", "training.gradient_accumulation_steps"
_TOKENS, _EVALUATED = "speed.max_tokens_per_batch", "evaluation.batch_size"
_SHORTEST = 32
"""Tokens; no shorter `max_length` is proposed."""

_PATIENCE, _PATIENCE_FOR_A_PROPOSAL = 80.0, 20.0
"""Seconds for whole steps; where those that must be run need more, parts stand for them."""
_MARGIN = 1.15
"""Over a peak that is expected from parts: the line is off by some, and a smaller pass of many rows costs nothing."""

Settings = Mapping[str, object]
"""Values by path of the configuration."""


@dataclass(frozen=True)
class TrialRequest:
    """What the child is asked."""

    config: dict[str, object]
    started: float
    """When it was, in seconds of the system's clock."""
    first_step: int = 0
    """Updates that are done already."""
    available: int | None = None
    """Bytes that the run may hold, in place of what is free."""
    patience: float = _PATIENCE
    """Seconds for a typical step, the largest and one that is timed."""
    tells_progress: bool = False
    """Whether it says on stderr what it measures."""


@dataclass(frozen=True)
class Proposal:
    """Settings with which the run fits; an update sees as many rows (of a token budget, tokens)."""

    settings: Settings
    estimate: Estimate

    def describe(self) -> str:
        """Return what to add to the command line, and what it leads to."""
        return f"{_describe_settings(self.settings)}\n{self.estimate.describe()}"


@dataclass(frozen=True)
class Plan:
    """What was asked for, and where it doesn't fit, what does."""

    estimate: Estimate
    proposal: Proposal | None = None

    def to_dict(self) -> dict[str, object]:
        """Return what `plan --json` prints."""
        proposal = self.proposal and {"settings": dict(self.proposal.settings), **self.proposal.estimate.to_dict()}
        return {**self.estimate.to_dict(), "proposal": proposal}

    def require_fit(self) -> None:
        """Raise where the run doesn't fit.

        Raises:
            StorageError: With what does fit.
        """
        if self.estimate.memory.fits:
            return
        advice = "Nothing that was tried does: choose a smaller model."
        if self.proposal:
            kept = "tokens" if _TOKENS in self.proposal.settings else "rows"
            advice = f"This does, with as many {kept} in an update: {self.proposal.describe()}"
        raise errors.StorageError(f"the run doesn't fit in memory: {self.estimate.describe_memory()}. {advice}")


def plan(
    config: ExperimentConfig, out: Path | None = None, *, resume: bool = False, available: int | None = None
) -> Plan:
    """Take a few real steps of a run, outside of its folder, and say what all of it takes.

    Args:
        config: The whole run.
        out: The run's folder, which is only read.
        resume: Count what is left from the newest checkpoint in `out`.
        available: Bytes that the run may hold. Left out, what is free.

    Raises:
        ConfigError, DataError, ModelError, StorageError: What would end the run before its first step.
    """
    checkpoint = RunDir(out).newest_checkpoint() if out and resume else None
    first_step = checkpoint.step if checkpoint else 0
    estimate = run_trial(config, first_step=first_step, available=available)
    if estimate.memory.fits:
        return Plan(estimate)
    patience, available = _PATIENCE_FOR_A_PROPOSAL, estimate.memory.available
    try_out = partial(run_trial, first_step=first_step, available=available, patience=patience)
    return Plan(estimate, propose(config, estimate, try_out))


def run_trial(
    config: ExperimentConfig, *, first_step: int = 0, available: int | None = None, patience: float = _PATIENCE
) -> Estimate:
    """Run the trial of a configuration in a child process.

    Raises:
        KeyboardInterrupt: A signal arrived; the trial has ended.
        SmoloraError: As the child raised it.
    """
    with tempfile.TemporaryDirectory(prefix="smolora-plan-") as name:
        folder = Path(name)
        values, tells_progress = config.model_dump(mode="json"), logger.isEnabledFor(logging.INFO)
        request = TrialRequest(values, time.time(), first_step, available, patience, tells_progress)
        write_json(folder / REQUEST, asdict(request))
        # -P and our own path: a file named like a library in the current folder must not come before it.
        command = [sys.executable, "-P", "-m", "smolora.recipes.plan_trial", name]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
        code = _run(command, environment)
        ended = time.time()
        # As the kernel ends a process when memory runs out, and as one of C++ ends when it gets none.
        if sys.platform != "win32" and code in (-signal.SIGKILL, -signal.SIGABRT):
            logger.info("the trial was ended by %s, which is taken for want of memory", signal.Signals(-code).name)
            return Estimate(Memory(available, None))
        if code:
            raise RuntimeError(f"the trial of the run ended with code {code}")
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        unwinding = ended - (folder / RESULT).stat().st_mtime
    if "error" in result:
        raise errors.__dict__[result["error"]](result["message"])
    estimate = Estimate.from_dict(result)
    seconds = estimate.seconds
    # To take an interpreter down that holds a model is half a second.
    return replace(estimate, seconds=seconds and replace(seconds, ending=seconds.ending + unwinding))


def _run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Return the code with which a process ends; a signal ends it at once, since nothing of it is kept."""
    with (
        deferred_signals() as stop,
        # In a session of its own a terminal's Ctrl-C doesn't reach it, which would die of it with a traceback.
        subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment, start_new_session=True) as process,
    ):
        code = None
        try:
            while code is None and not stop.signal_name:
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(timeout=_GLANCE)
        finally:
            process.kill()  # A second signal interrupts, and must not leave it running either.
            process.wait()
        if stop.signal_name:
            raise KeyboardInterrupt(stop.signal_name)  # Not StoppedBySignal: there is nothing to go on with.
    assert code is not None, "it has ended"
    return code


def propose(
    config: ExperimentConfig, estimate: Estimate, try_out: Callable[[ExperimentConfig], Estimate]
) -> Proposal | None:
    """Return the first changes that make a run fit; an update sees as many rows as before.

    Each is tried on top of those before it; one that the run's method refuses is left out.

    Args:
        config: The run that doesn't fit.
        estimate: Of it.
        try_out: Returns the estimate of another.
    """
    budget, passes = config.speed.max_tokens_per_batch, config.training.gradient_accumulation_steps
    path, whole = (_TOKENS, budget) if budget else (_ROWS, config.training.per_device_train_batch_size)
    kept: Settings = {}
    for change in _iter_changes(config, estimate.work):
        changes = {**kept, **change}
        settings_of = partial(_split, path, whole * passes, changes)
        trials = _Trials(settings_of, partial(_try_changed, config, try_out), counts_tokens=path == _TOKENS)
        if not changes:
            trials.known[whole] = estimate
        try:
            size = trials.find_fitting(whole, passes, available=estimate.memory.available)
        except errors.DataError:
            return None  # Cut this short, the rows have nothing left to learn.
        if size and (fitting := trials.known[size]):
            return Proposal(trials.settings_of(size), fitting)
        if trials.known[whole]:
            kept = changes
    return None


@dataclass(frozen=True)
class _Trials:
    """Runs that differ in the size of a pass alone, each tried once, and few of them."""

    settings_of: Callable[[int], Settings]
    try_out: Callable[[Settings], Estimate]
    counts_tokens: bool
    """Whether the size of a pass is its tokens; else it is its rows."""
    known: dict[int, Estimate | None] = field(default_factory=dict)
    """What was tried, by size; None where no run can have it."""

    def find_fitting(self, whole: int, passes: int, *, available: int | None) -> int | None:
        """Return the largest size of a pass that fits: expected from larger ones where their parts say it, then tried.

        None where not even the smallest does.
        """
        self._try(whole)
        if available is None:  # The trial ran out before anybody looked: what lives through its own fits.
            available = sys.maxsize - 1
        if self.measure(whole) <= available:
            return whole
        while fitting := split_update(self.measure, whole, passes, available=available):
            if fitting[0] in self.known:
                return fitting[0]
            self._try(fitting[0])
        return None

    def measure(self, size: int) -> int:
        """Return the peak in bytes of a run whose passes have this size; none for a size that no run can have.

        More than there can be, for one that was tried and didn't fit.
        """
        larger = [other for other, found in self.known.items() if other > size and found and found.parts]
        if size not in self.known and larger:
            return self._expect(size, min(larger))
        self._try(size)
        found = self.known[size]
        if found is None:
            return 0  # The search goes on upwards.
        peak = found.memory.peak
        return peak if peak is not None and found.memory.fits else sys.maxsize

    def _try(self, size: int) -> None:
        if size in self.known:
            return
        try:
            self.known[size] = self.try_out(self.settings_of(size))
        except errors.ConfigError:
            self.known[size] = None  # A budget below a row, or a change that the method refuses.

    def _expect(self, size: int, larger: int) -> int:
        """Return the peak to allow for, by the line through the parts of a larger pass.

        The more rows a pass has, the nearer it is to the mean: what the largest of many has beyond that grows with the
        root of its rows, and of a single row it is the longest.
        """
        found = self.known[larger]
        assert found and found.parts and found.work and found.memory.peak, "parts come with all of these"
        parts, work = found.parts, found.work
        if self.counts_tokens and size < work.longest_row:
            return 0
        held = float(size)
        if not self.counts_tokens:
            mean = parts.pass_tokens / min(larger, work.rows)
            held = size * mean + math.sqrt(size) * (work.longest_row - mean)
        held = min(held, parts.pass_tokens)
        return round(_MARGIN * (found.memory.peak - parts.bytes_per_token * (parts.pass_tokens - held)))


def _split(path: str, whole: int, change: Settings, size: int) -> Settings:
    return {path: size, _PASSES: whole // size, **change}


def _describe_settings(settings: Settings) -> str:
    """Return them as words of a command line."""
    words = [f"{path}={str(value).lower()}" for path, value in settings.items() if path != _ROWS]
    if _ROWS in settings:
        words.insert(0, f"--batch-size {int(str(settings[_ROWS])) * int(str(settings[_PASSES]))}")
    return " ".join(words)


def _try_changed(
    config: ExperimentConfig, try_out: Callable[[ExperimentConfig], Estimate], settings: Settings
) -> Estimate:
    changed = apply_settings(config, settings)
    logger.info("it doesn't fit; trying %s", _describe_settings(settings))
    return try_out(changed)


def _iter_changes(config: ExperimentConfig, work: Work | None) -> Iterator[Settings]:
    """Yield what to change beside the rows of a pass, from what costs least to what loses most."""
    yield {}
    if config.evaluation.batch_size > 1 and (work is None or work.held_out_rows):
        yield {_EVALUATED: 1}
    if not config.training.gradient_checkpointing:
        yield {"training.gradient_checkpointing": True}
    if config.speed.packed_weights:
        yield {"speed.packed_weights": False}
    length = work.longest_row // 2 if work else 0
    while length >= _SHORTEST:
        overlong = "drop" if config.data.overlong == "drop" else "truncate"
        yield {"data.max_length": length, "data.overlong": overlong}
        length //= 2


def apply_settings(config: ExperimentConfig, settings: Settings) -> ExperimentConfig:
    """Return a configuration with values changed by path."""
    values = config.model_dump(exclude_unset=True)
    for path, value in settings.items():
        section, name = path.split(".")
        values.setdefault(section, {})[name] = value
    return ExperimentConfig(**values)
