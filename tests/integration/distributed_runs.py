"""The runs that one process and two make alike: their files, and their command lines."""

from __future__ import annotations

import json
from pathlib import Path

from tests.tiny import save_tiny_model

STEPS = 7
WORDS = ["one", "two", "three", "four", "five"]
TUNING = {
    "model.dtype": "float32",
    "adapter.r": 2,
    "adapter.lora_dropout": 0.0,
    "training.learning_rate": 3e-3,
    "training.max_steps": STEPS,
    "training.gradient_accumulation_steps": 2,
    "training.logging_steps": 1,
    "training.save_steps": 2,
    "training.seed": 3,
    "phases.strategy": "both,mlp,attn",
    "phases.phase1_end": 2,
    "phases.phase2_end": 5,
    "evaluation.batch_size": 2,
    "evaluation.verdict_share": 0,
}


def write_files(folder: Path) -> None:
    """Write a base, 17 rows of uneven lengths, 5 held-out rows, a file with a broken row, and a text.

    With 8 rows a step the last step of an epoch has one row, and one of two processes has none.
    """
    save_tiny_model("llama", folder / "base")
    rows = [
        {"prompt": f"{a} and {b}" + " more" * i, "completion": f"{b} {a}" + " yes" * j}
        for i, a in enumerate(WORDS)
        for j, b in enumerate(WORDS)
    ]
    _write_rows(folder / "rows.jsonl", rows[:17])
    _write_rows(folder / "held_out.jsonl", rows[17:22])
    (folder / "broken.jsonl").write_text((folder / "rows.jsonl").read_text() + "{not a row\n")
    (folder / "text.txt").write_text(" ".join(WORDS * 60))


def _write_rows(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tuning_words(folder: Path, rows: str = "rows.jsonl", *, batch_size: int = 8) -> list[str]:
    """Return the words of `train`, but for its folder."""
    files = ["--model", folder / "base", "--data", folder / rows, "--eval-data", folder / "held_out.jsonl"]
    return [*map(str, files), "--batch-size", str(batch_size), *(f"{path}={value}" for path, value in TUNING.items())]


def pretraining_words(folder: Path) -> list[str]:
    """Return the words of `pretrain`, but for its folder."""
    flags = "--batch-size 4 --max-steps 4 --layers 1 --heads 2 --width 16 --context 16 training.logging_steps=1"
    return ["--data", str(folder / "text.txt"), *flags.split()]
