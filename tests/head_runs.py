"""Runs of encoders with the head of a task, and rows of one's own that they are asked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smolora.config import DataConfig, ExperimentConfig, resolve_config
from smolora.evaluation.result import EvaluationResult
from smolora.recipes.evaluate import evaluate
from smolora.recipes.evaluation_request import EvaluationRequest
from smolora.recipes.finetune import finetune
from smolora.records.run_dir import RunDir
from tests.tiny import save_tiny_encoder

Rows = Sequence[Mapping[str, object]]


def write_rows(file: Path, rows: Rows) -> Path:
    """Write one object a line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def ask_rows(model: Path, rows: Rows, folder: Path, **given: Any) -> EvaluationResult:
    """Evaluate a model, or a run, on rows."""
    file = write_rows(folder / "own.jsonl", rows)
    return evaluate(EvaluationRequest(model=str(model), data=DataConfig(sources=(str(file),)), **given))


def tune_head(folder: Path, task: str, rows: Rows, *assignments: str, base: Path | None = None) -> RunDir:
    """Tune an encoder for a task, with time enough for its whole verdict."""
    settings = {
        "model.name_or_path": base or save_tiny_encoder("bert", folder / "base"),
        "model.task_type": task,
        "data.sources": write_rows(folder / "rows.jsonl", rows),
        "training.learning_rate": 1e-2,
        "training.eval_steps": 60,
        "evaluation.verdict_share": 1000,
    }
    given = [*(f"{name}={value}" for name, value in settings.items()), *assignments]
    return finetune(resolve_config(ExperimentConfig, assignments=given), folder / "run")


def read_verdict(run: RunDir) -> dict[str, Any]:
    """Return what verdict.json holds."""
    found: dict[str, Any] = json.loads(run.verdict.read_text())
    return found
