"""The predictions of any system, held against the rows of a benchmark. No torch, which takes seconds to import."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from smolora.data.readers import open_text
from smolora.data.rows import Reject, check_values
from smolora.errors import ConfigError, DataError
from smolora.evaluation.metric import Answer
from smolora.evaluation.metrics import MetricsCalculator
from smolora.evaluation.prediction_log import PredictionLog
from smolora.evaluation.result import EvaluationResult
from smolora.evaluation.row_source import RowSource
from smolora.evaluation.scoring import Progress, score_answers
from smolora.records.staging import hash_file

_AT_ONCE = 256


def evaluate_predictions(
    file: Path, source: RowSource, *, folder: Path | None = None, progress: Progress = lambda num_rows: None
) -> EvaluationResult:
    """Score the predictions of any system: one a line, in the order of the rows; an empty line is an empty prediction.

    Raises:
        ConfigError: The file is what would be written into `folder`.
        DataError: There are more or fewer lines than rows, or one isn't UTF-8.
    """
    num_rows, num_lines = source.count(), sum(1 for _ in _iter_lines(file))
    if num_rows != num_lines:
        raise DataError(
            f"{file} has {num_lines:,} lines, and {source.name} {num_rows:,} rows. Write one prediction a line, in "
            "the order of the rows; an empty line is an empty prediction."
        )
    identity = {**source.identify(), "predictions": hash_file(file)}
    log = PredictionLog(folder, identity, is_resumed=False) if folder else None
    if log and log.predictions.exists() and log.predictions.samefile(file):
        raise ConfigError(f"{file} is where the scored predictions would be written. Choose another folder with -o.")
    lines = _iter_lines(file)
    return score_answers(
        lambda rows: [Answer(next(lines)) for _ in rows],
        source.iter_rows(),
        MetricsCalculator(source.metrics, resources=source.resources),
        at_once=_AT_ONCE,
        log=log,
        progress=progress,
    )


def _iter_lines(file: Path) -> Iterator[str]:
    with open_text(file) as lines:
        for number, line in enumerate(lines, start=1):
            found = check_values({"prediction": line.rstrip("\r\n")}, str(file), number)
            if isinstance(found, Reject):
                raise DataError(f"{found.file}:{found.line}: {found.reason}.")
            yield str(found.values["prediction"])
