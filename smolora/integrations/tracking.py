"""`training.report_to`: what metrics.jsonl gets goes to trackers too.

metrics.jsonl is the truth; a tracker gets its lines and nothing else, each step once, also over resumes and kills. All
of a tool happens in a thread of its own: what it raises is one warning, and it never holds up a step.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import secrets
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import yaml

from smolora.config import flatten_settings
from smolora.config.training import TrackerName
from smolora.errors import ConfigError, clause
from smolora.integrations.trackers import (
    MLflowTracker,
    TensorBoardTracker,
    TrackedRun,
    Tracker,
    TrackioTracker,
    WandBTracker,
)
from smolora.records.metrics_log import MetricsLog, Scalar
from smolora.records.run_dir import RunDir
from smolora.records.staging import write_json
from smolora.training.callback import Callback

if TYPE_CHECKING:
    from smolora.training.state import StepRecord
    from smolora.training.trainer import Trainer

logger = logging.getLogger(__name__)

_PROJECT = "smolora"


class TrackerCallback(Callback):
    """Hands the lines of metrics.jsonl to a tool. Use one of its subclasses, or `training.report_to`."""

    kind: ClassVar[type[Tracker]]

    def __init__(self, project: str = _PROJECT) -> None:
        """Group runs under `project` in the tool; its own environment variable for that wins.

        Raises:
            ConfigError: The tool isn't installed.
        """
        require_trackers([self.kind.tool])
        self.project = project
        self._feed: _Feed | None = None

    def on_train_begin(self, trainer: Trainer) -> None:
        """Begin the tool's run, or go on with it, and bring it up to date.

        Raises:
            ConfigError: The trainer has no folder, so there is no metrics.jsonl to forward.
        """
        if not trainer.is_main_process:
            return
        if trainer.run_dir is None:
            raise ConfigError(f"{type(self).__name__} forwards metrics.jsonl: give the Trainer a run_dir.")
        settings = _read_settings(trainer.run_dir) or {"training": trainer.config.model_dump(mode="json")}
        self._feed = _Feed(self.kind(), trainer.run_dir, self.project, flatten_settings(settings))
        self._feed.catch_up()

    def on_log(self, trainer: Trainer, record: StepRecord) -> None:
        if self._feed:
            self._feed.catch_up()

    def on_train_end(self, trainer: Trainer) -> None:
        if self._feed:
            self._feed.catch_up()
            self._feed.close()
            self._feed = None


class TensorBoardCallback(TrackerCallback):
    """The same as `training.report_to=tensorboard`."""

    kind = TensorBoardTracker


class TrackioCallback(TrackerCallback):
    """The same as `training.report_to=trackio`."""

    kind = TrackioTracker


class WandBCallback(TrackerCallback):
    """The same as `training.report_to=wandb`."""

    kind = WandBTracker


class MLflowCallback(TrackerCallback):
    """The same as `training.report_to=mlflow`."""

    kind = MLflowTracker


_CALLBACKS: Mapping[TrackerName, type[TrackerCallback]] = {
    callback.kind.tool: callback for callback in (TensorBoardCallback, TrackioCallback, WandBCallback, MLflowCallback)
}


def require_trackers(names: Iterable[TrackerName]) -> None:
    """Raise unless the tools are installed; imports none of them.

    Raises:
        ConfigError: One isn't.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"training.report_to: {name} isn't installed. Install it with: pip install 'smolora[{name}]', "
                "or leave it out: metrics.jsonl has every number."
            )


def build_trackers(names: Iterable[TrackerName], callbacks: Iterable[Callback]) -> list[Callback]:
    """Return a callback for each tool, but for those that are among `callbacks` already.

    Raises:
        ConfigError: A tool isn't installed.
    """
    present = {callback.kind.tool for callback in callbacks if isinstance(callback, TrackerCallback)}
    return [_CALLBACKS[name]() for name in names if name not in present]


class _Feed:
    """Gives a tracker each step of a run's metrics.jsonl once."""

    def __init__(self, tracker: Tracker, run_dir: RunDir, project: str, settings: Mapping[str, object]) -> None:
        self._tracker = tracker
        self._log = MetricsLog(run_dir.metrics)
        self._offset = 0
        self._sent = _Sent(run_dir.trackers / f"{tracker.tool}.json")
        folder = run_dir.trackers / tracker.tool
        self._run = TrackedRun(
            run_dir.path.resolve().name, project, folder, self._sent.key, settings, self._sent.is_known
        )
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=tracker.tool)
        self._pending: list[Future[None]] = []
        self._is_open, self._has_failed, self._is_reported = False, False, False
        self._do(self._open)

    def catch_up(self) -> None:
        """Send what was written since the last call."""
        records, self._offset = self._log.read_new(self._offset)
        for record in records:
            self._do(partial(self._send, record))
        self._look()

    def close(self) -> None:
        """Wait until all is sent."""
        self._pending.append(self._pool.submit(self._close))
        self._pool.shutdown(wait=True)
        self._look()

    def _open(self) -> None:
        self._run.folder.mkdir(parents=True, exist_ok=True)
        self._tracker.open(self._run)
        self._is_open = True

    def _close(self) -> None:
        if self._is_open:
            self._tracker.close()

    def _send(self, record: Mapping[str, Scalar]) -> None:
        step = record.get("step")
        values = {name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"}
        if isinstance(step, int) and step > self._sent.step:
            self._sent.mark(step)  # Before: a kill in between costs the tool a step, and never gives it one twice.
            self._tracker.log(step, values)

    def _do(self, work: Callable[[], None]) -> None:
        self._pending.append(self._pool.submit(self._unless_failed, work))

    def _unless_failed(self, work: Callable[[], None]) -> None:
        if not self._has_failed:
            self._has_failed = True  # Until it is done: what waits behind a failure isn't tried.
            work()
            self._has_failed = False

    def _look(self) -> None:
        """Report the first failure, once. A future keeps whatever was raised, so that nothing has to be caught."""
        errors = [future.exception() for future in self._pending if future.done()]
        self._pending = [future for future in self._pending if not future.done()]
        error = next((error for error in errors if error), None)
        if error and not self._is_reported:
            self._is_reported = True
            logger.warning(
                "%s gets no more numbers: %s: %s. The run goes on, and metrics.jsonl has all of them.",
                self._tracker.tool,
                type(error).__name__,
                clause(error),
            )


class _Sent:
    """The name of the tool's run and the last step it got, in a file beside its own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.key, self.step = secrets.token_hex(4), -1
        self.is_known = path.is_file()
        if self.is_known:
            kept = json.loads(path.read_text(encoding="utf-8"))
            self.key, self.step = kept["key"], kept["step"]

    def mark(self, step: int) -> None:
        """Note that `step` is about to be sent."""
        self.step = step
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._path, {"key": self.key, "step": step})


def _read_settings(run_dir: RunDir) -> dict[str, object]:
    if not run_dir.resolved_config.is_file():
        return {}
    settings: dict[str, object] = yaml.safe_load(run_dir.resolved_config.read_text(encoding="utf-8"))
    return settings
