"""`smolora evaluate`: a model, or a file of predictions, on a benchmark or on a person's own rows."""

from __future__ import annotations

import logging
from collections.abc import Callable

from smolora.evaluation.predictions import evaluate_predictions
from smolora.evaluation.result import EvaluationResult
from smolora.evaluation.row_source import RowSource, open_benchmark, open_data
from smolora.evaluation.scoring import Progress
from smolora.evaluation.trained_rows import count_trained_rows
from smolora.recipes.evaluation_request import EvaluationRequest

logger = logging.getLogger(__name__)

ProgressOf = Callable[[int], Progress]
"""Makes a listener from the number of rows."""


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
    if request.predictions is None:
        return _ask_model(request, progress_of)
    of = _open_benchmark(request)
    return evaluate_predictions(request.predictions, of, folder=request.out, progress=progress_of(of.count()))


def _ask_model(request: EvaluationRequest, progress_of: ProgressOf) -> EvaluationResult:
    from smolora.adapters.store import open_model  # Here, since torch takes seconds, and predictions need none.
    from smolora.evaluation.tasks import choose_folder, evaluate_model

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
        num_trained_on=count_trained_rows(request.model, rows.iter_rows()),
        progress=progress_of(rows.count()),
    )


def _open_benchmark(request: EvaluationRequest) -> RowSource:
    return open_benchmark(
        str(request.benchmark), request.data_dir, split=request.split, num_samples=request.num_samples
    )
