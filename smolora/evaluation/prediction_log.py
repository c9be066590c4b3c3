"""predictions.jsonl: every answer with its row and its scores, written as they come.

A stopped evaluation goes on where it was: the answers that are there are scored again and not asked for again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

from smolora.data.benchmark_rows import BenchmarkRow
from smolora.errors import ConfigError
from smolora.evaluation.metric import Answer
from smolora.evaluation.result import EvaluationResult
from smolora.records.run_dir import RunDir
from smolora.records.staging import describe_os_error, write_json

logger = logging.getLogger(__name__)

Scored = tuple[BenchmarkRow, Answer, Mapping[str, object]]


class PredictionLog:
    """The folder of one evaluation; one of another model, other rows or settings begins anew there."""

    def __init__(self, folder: Path, identity: Mapping[str, object], *, is_resumed: bool = True) -> None:
        self.folder = folder
        self.predictions = folder / "predictions.jsonl"
        self.evaluation = folder / "evaluation.json"
        self.locked = RunDir(folder).locked
        self._is_resumed = is_resumed
        self._identity = json.loads(json.dumps(identity))

    def replay(self) -> Iterator[Answer]:
        """Yield the answers that are here, then cut off a line that was torn.

        Raises:
            ConfigError: There is a predictions.jsonl that no evaluation wrote.
            StorageError: The folder can't be written.
        """
        kept = self._read_evaluation()
        if "identity" not in kept and self.predictions.exists():
            raise ConfigError(
                f"{self.predictions} is no evaluation's (there is no {self.evaluation.name} beside it), and would be "
                "written over. Choose another folder with -o, or move it."
            )
        try:
            whole = 0
            if not self._is_resumed or kept.get("identity") != self._identity:
                self._warn_of_loss(kept)
                self.predictions.unlink(missing_ok=True)
                write_json(self.evaluation, {"identity": self._identity})
            self.predictions.touch()
            with self.predictions.open("rb") as file:
                for line in file:
                    if (answer := _read_answer(line)) is None:
                        break
                    whole += len(line)
                    yield answer
            with self.predictions.open("r+b") as file:
                file.truncate(whole)
        except OSError as error:
            raise describe_os_error(error, self.predictions) from error

    def append(self, scored: Sequence[Scored]) -> None:
        """Write answers with what scored them.

        Raises:
            StorageError: The folder can't be written.
        """
        lines = [json.dumps(_to_json(*one), ensure_ascii=False, allow_nan=False) + "\n" for one in scored]
        try:
            with self.predictions.open("a", encoding="utf-8", newline="\n") as file:
                file.writelines(lines)
        except OSError as error:
            raise describe_os_error(error, self.predictions) from error

    def finish(self, result: EvaluationResult) -> None:
        """Write the result into evaluation.json."""
        write_json(self.evaluation, {"identity": self._identity, **result.to_dict()})

    def _read_evaluation(self) -> dict[str, object]:
        try:
            found = json.loads(self.evaluation.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _warn_of_loss(self, kept: Mapping[str, object]) -> None:
        """Say so where a finished evaluation of something else is about to be discarded."""
        before = cast("Mapping[str, object]", kept.get("identity", {}))
        missing = object()
        names = [n for n in {**before, **self._identity} if before.get(n, missing) != self._identity.get(n, missing)]
        if names and "metrics" in kept:
            logger.warning("%s held another evaluation, which is discarded: other %s.", self.folder, ", ".join(names))


def _to_json(row: BenchmarkRow, answer: Answer, scores: Mapping[str, object]) -> dict[str, object]:
    measured: dict[str, object] = {
        "label": answer.label,
        "labels": answer.labels,
        "loss_sum": answer.loss_sum,
        "num_tokens": answer.num_tokens,
    }
    return {
        "prompt": row.prompt,
        "references": row.references,
        "prediction": answer.text,
        "scores": scores,
        **{name: value for name, value in measured.items() if value not in (None, 0, ())},
    }


def _read_answer(line: bytes) -> Answer | None:
    """Return the answer of a line, or None where the line isn't whole."""
    try:
        values = json.loads(line) if line.endswith(b"\n") else {}
    except ValueError:
        return None
    if not isinstance(values, dict) or not isinstance(values.get("prediction"), str):
        return None
    labels = values.get("labels", [])
    if not isinstance(labels, list):
        return None
    measured = values.get("loss_sum"), values.get("num_tokens", 0), tuple(labels)
    return Answer(values["prediction"], values.get("label"), *measured)
