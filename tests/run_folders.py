"""Run folders as `train` leaves them, written in milliseconds: settings, metrics and a gradient log.

run = write_run(tmp_path / "run", phases=(("both", 4), ("mlp", 8)))      # steps 1-4 train both, 5-8 the MLP
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

import yaml

GROUPS = ("attention", "mlp", "embed", "lm_head")
SETTINGS = {
    "model": {"name_or_path": "base"},
    "data": {"sources": ["rows.csv"]},
    "adapter": {"method": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all"},
    "training": {"learning_rate": 2e-4, "max_steps": None, "per_device_train_batch_size": 8},
}

Row = dict[str, object]


def write_run(
    folder: Path,
    *,
    phases: Sequence[tuple[str, int]] = (("both", 20),),
    losses: Sequence[float] | None = None,
    eval_losses: dict[int, float] | None = None,
    num_layers: int = 3,
    norms: dict[int, float] | None = None,
    has_gradients: bool = True,
    settings: dict[str, object] = SETTINGS,
) -> Path:
    """Write a run and return its folder.

    Args:
        folder: Where.
        phases: What is trained (both, attention, mlp, early, late) and the last step of that.
        losses: The loss of each step; left out, it falls.
        eval_losses: The held-out loss by step.
        num_layers: Blocks of the model.
        norms: Steps at which every norm is so many times as large.
        has_gradients: Whether a gradient log is written.
        settings: What resolved_config.yaml holds.
    """
    folder.mkdir(parents=True)
    (folder / "resolved_config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    layer_rows = [_layer_row(step, phases, num_layers, (norms or {}).get(step, 1.0)) for step in _steps(phases)]
    group_rows = [_group_row(row) for row in layer_rows]
    if has_gradients:
        _write_csv(folder / "gradient_analysis.layer_norms.csv", layer_rows)
        _write_csv(folder / "gradient_analysis.group_norms.csv", group_rows)
    lines: dict[int, Row] = {}
    for row in group_rows:
        step = int(str(row["step"]))
        loss = losses[step - 1] if losses else 2 + 2 * math.exp(-step / 5)
        lines[step] = {"step": step, "loss": loss, "grad_norm": row["total"], "phase": row["phase"]}
    for step, eval_loss in (eval_losses or {}).items():
        lines[step] = {**lines.get(step, {"step": step}), "eval_loss": eval_loss}
    text = "".join(json.dumps(lines[step]) + "\n" for step in sorted(lines))
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def read_table(file: Path) -> dict[str, list[float]]:
    """Return a written CSV by column, NaN for an empty cell."""
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return {name: [float(row[name] or "nan") for row in rows] for name in rows[0]}


def _steps(phases: Sequence[tuple[str, int]]) -> range:
    return range(1, phases[-1][1] + 1)


def _layer_row(step: int, phases: Sequence[tuple[str, int]], num_layers: int, factor: float) -> Row:
    number, trained = next((n, name) for n, (name, last) in enumerate(phases, start=1) if step <= last)
    row: Row = {"step": step, "phase": number if len(phases) > 1 else 0}
    for layer in range(num_layers):
        for group in ("attention", "mlp"):
            half = {"early": layer < num_layers // 2, "late": layer >= num_layers // 2}.get(trained, True)
            is_trained = half and (trained not in ("attention", "mlp") or trained == group)
            norm = factor * (layer + 1) * (2.0 if group == "mlp" else 1.0) / step
            row[f"layer_{layer}_{group}"] = norm if is_trained else ""
    return row


def _group_row(layer_row: Row) -> Row:
    squares = {
        group: [float(str(norm)) ** 2 for name, norm in layer_row.items() if name.endswith(f"_{group}") and norm != ""]
        for group in GROUPS
    }
    norms = {group: math.sqrt(sum(found)) if found else "" for group, found in squares.items()}
    total = math.sqrt(sum(sum(found) for found in squares.values()))
    active = 100 * sum(len(found) for found in squares.values())
    return {"step": layer_row["step"], "phase": layer_row["phase"], "active": active, **norms, "total": total}


def _write_csv(file: Path, rows: Sequence[Row]) -> None:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
