"""The tools that show runs: each is imported inside its own class, and stays on this machine unless told otherwise.

A tracker gets numbers by step and a flat configuration. It keeps its files in the run's folder, but for trackio, which
has one place for all runs. What of its environment says that a person wants it elsewhere is written at each class.
"""

from __future__ import annotations

import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from smolora.config.training import TrackerName

if TYPE_CHECKING:
    import trackio
    import wandb
    from mlflow.tracking import MlflowClient
    from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run."""

    name: str
    """Of the run's folder."""
    project: str
    """What the tool groups runs under."""
    folder: Path
    """Where the tool may keep its files."""
    key: str
    """Name of the tool's own run, the same after a resume."""
    settings: Mapping[str, object]
    """The configuration by dotted path."""
    is_resumed: bool
    """Whether the tool has this run already."""


class Tracker(ABC):
    """One tool, for one run. What its methods raise is reported once and ends the tracking, not the run."""

    tool: ClassVar[TrackerName]

    @abstractmethod
    def open(self, run: TrackedRun) -> None:
        """Begin the tool's run, or go on with it."""

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand over the numbers of one step."""

    @abstractmethod
    def close(self) -> None:
        """Write what is left."""


class TensorBoardTracker(Tracker):
    """Event files: `tensorboard --logdir RUN/trackers/tensorboard`."""

    tool = "tensorboard"
    _writer: SummaryWriter

    def open(self, run: TrackedRun) -> None:
        """Start another event file; TensorBoard reads all of a folder as one run."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.folder))
        if not run.is_resumed:
            lines = [f"| {path} | {value} |" for path, value in run.settings.items()]
            self._writer.add_text("config", "\n".join(["| setting | value |", "| --- | --- |", *lines]))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write a scalar each."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class WandBTracker(Tracker):
    """Weights & Biases, offline unless WANDB_MODE or WANDB_API_KEY is set: `wandb sync RUN/trackers/wandb/wandb/*`."""

    tool = "wandb"
    _run: wandb.Run

    def open(self, run: TrackedRun) -> None:
        """Start a run, or go on with the one of the same id."""
        is_online = "WANDB_MODE" in os.environ or "WANDB_API_KEY" in os.environ
        if not is_online:
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # Read when wandb is imported.
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", run.project),
            name=run.name,
            id=run.key,
            resume="allow",
            config=dict(run.settings),
            dir=str(run.folder),
            mode=None if is_online else "offline",
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of a step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """End the run; online, wait until all is sent."""
        self._run.finish()


class TrackioTracker(Tracker):
    """Trackio, in its own place on this machine unless TRACKIO_SPACE_ID or the like is set: `trackio show`."""

    tool = "trackio"
    _run: trackio.Run

    def open(self, run: TrackedRun) -> None:
        """Start a run, or go on with the one of the same name."""
        import trackio

        with redirect_stdout(sys.stderr):  # It prints how to open its dashboard.
            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", run.project),
                name=f"{run.name}-{run.key}",
                config=dict(run.settings),
                resume="allow",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of a step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Write what is left."""
        with redirect_stdout(sys.stderr):
            self._run.finish()


class MLflowTracker(Tracker):
    """MLflow, in SQLite unless MLFLOW_TRACKING_URI is set.

    `mlflow ui --backend-store-uri sqlite:///RUN/trackers/mlflow/mlflow.db` shows it.
    """

    tool = "mlflow"
    _client: MlflowClient
    _run_id: str

    def open(self, run: TrackedRun) -> None:
        """Start a run, or go on with the one of the same tag."""
        if "MLFLOW_TRACKING_URI" not in os.environ:
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # Read when mlflow is imported.
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        run.folder.mkdir(parents=True, exist_ok=True)
        store = f"sqlite:///{(run.folder / 'mlflow.db').resolve()}"
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", store))
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", run.project)
        experiment = self._client.get_experiment_by_name(project)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(project)
        found = self._client.search_runs([experiment_id], f"tags.smolora = '{run.key}'")
        if found:
            self._run_id = found[0].info.run_id
            return
        created = self._client.create_run(experiment_id, run_name=run.name, tags={"smolora": run.key})
        self._run_id = created.info.run_id
        self._client.log_batch(
            self._run_id, params=[Param(path, str(value)[:6000]) for path, value in run.settings.items()]
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of a step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run_id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run_id)
