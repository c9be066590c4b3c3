"""`smolora evaluate`: a model, or a file of predictions, on a benchmark or on a person's own rows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from smolora.adapters.store import open_model
from smolora.config.data import DataConfig
from smolora.errors import ConfigError
from smolora.evaluation.evaluator import Progress
from smolora.evaluation.result import EvaluationResult
from smolora.evaluation.row_source import RowSource, open_benchmark, open_data
from smolora.evaluation.tasks import check_drawing, choose_folder, evaluate_model, evaluate_predictions
from smolora.generation.sampling import SamplingSettings

logger = logging.getLogger(__name__)

ProgressOf = Callable[[int], Progress]
"""Makes a listener from the number of rows."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """What is evaluated, on what, and how."""

    model: str | None = None
    """A run, a model or adapter folder, or a hub id."""
    base: str | None = None
    """The base of an adapter, where its folder doesn't lead to it."""
    predictions: Path | None = None
    """Or a file with a prediction a line."""
    benchmark: str | None = None
    data_dir: Path | None = None
    """The benchmark's folder."""
    split: str = "test"
    data: DataConfig = field(default_factory=DataConfig)
    """Or a person's own rows."""
    num_samples: int | None = None
    batch_size: int = 16
    settings: SamplingSettings | None = None
    by_likelihood: bool = False
    out: Path | None = None
    device: str = "auto"

    def check(self) -> None:
        """Raise unless it is clear what to evaluate on what.

        Raises:
            ConfigError: It isn't.
        """
        if (self.model is None) == (self.predictions is None):
            raise ConfigError("name a model, or a file with --predictions: one of the two.")
        if (self.benchmark is None) != bool(self.data.sources):
            raise ConfigError("name the rows with --benchmark NAME (and its --data-dir), or with --data FILE.")
        if self.predictions is not None and self.benchmark is None:
            raise ConfigError("--predictions are of a benchmark's rows: name it with --benchmark NAME --data-dir DIR.")
        for name, number in (("--num-samples", self.num_samples), ("--batch-size", self.batch_size)):
            if number is not None and number < 1:
                raise ConfigError(f"{name} must be at least 1, found {number}.")
        self._refuse_idle()

    def _refuse_idle(self) -> None:
        """Raise where something is named that changes nothing beside the rest."""
        usual = vars(EvaluationRequest())
        given = {name for name, value in vars(self).items() if value != usual[name]} | self.data.model_fields_set
        drawing = self.settings.model_fields_set if self.settings else set()
        idle_beside = {
            "--predictions": {"base", "by_likelihood", "batch_size", "device", *drawing} if self.predictions else set(),
            "--benchmark": set(DataConfig.model_fields) - {"sources"} if self.benchmark else set(),
            "--data": {"data_dir", "split"} if self.data.sources else set(),
            "--by-likelihood": drawing if self.by_likelihood else set(),
        }
        for flag, idle in idle_beside.items():
            if found := sorted(idle & (given | drawing)):
                names = ", ".join(f"--{name.replace('_', '-')}" for name in found)
                raise ConfigError(f"{names} would change nothing beside {flag}: leave it out.")
        check_drawing(self.settings)


def evaluate(
    request: EvaluationRequest, progress_of: ProgressOf = lambda num_rows: lambda num_done: None
) -> EvaluationResult:
    """Evaluate as asked; predictions and scores of rows are kept in `out`, or in the run that is evaluated.

    Raises:
        ConfigError: The request contradicts itself, or names no such benchmark.
        DataError: Rows or predictions are missing, or a prompt leaves no room in the model's context.
        ModelError: There is no such model.
        StorageError: The predictions can't be written.
        FolderInUseError: Another evaluation writes there.
    """
    request.check()
    if request.predictions is not None:
        of = _open_benchmark(request)
        return evaluate_predictions(request.predictions, of, folder=request.out, progress=progress_of(of.count()))
    rows = _open_benchmark(request) if request.benchmark else None
    if rows:
        rows.count()  # What is wrong with the rows is said before a model is loaded.
    assert request.model is not None, "check has seen to that"
    bundle = open_model(request.model, request.base, device=request.device)
    rows = rows or open_data(
        request.data,
        trained=bundle.prompt_format,
        tokenizer=bundle.tokenizer,
        task=bundle.task,
        num_samples=request.num_samples,
    )
    folder = choose_folder(request.model, rows, request.out)
    if folder is None:
        logger.info("predictions aren't kept: name a folder for them with -o.")
    return evaluate_model(
        bundle,
        rows,
        batch_size=request.batch_size,
        settings=request.settings,
        by_likelihood=request.by_likelihood,
        folder=folder,
        progress=progress_of(rows.count()),
    )


def _open_benchmark(request: EvaluationRequest) -> RowSource:
    return open_benchmark(
        str(request.benchmark), request.data_dir, split=request.split, num_samples=request.num_samples
    )
