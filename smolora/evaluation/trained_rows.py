"""Which rows a model was trained on: a score on those shows what it remembers, not what it has learned.

A tuning run keeps 8 bytes for each different pair of a prompt and an answer that it was given to learn from, and those
of the runs that it started from. What it holds out isn't among them; a row that it leaves out as too long is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path

from smolora.data.benchmark_rows import BenchmarkRow, Prompt
from smolora.data.prompts import PromptFormat
from smolora.data.rows import Row
from smolora.data.sources import SourceRows
from smolora.evaluation.head_rows import HEAD_KINDS, iter_head_rows
from smolora.evaluation.row_source import read_pair
from smolora.records.run_dir import RunDir
from smolora.records.staging import write_bytes

_BYTES = 8
"""Of a digest: among 100,000 rows and 1,000 others, two that differ are taken for one once in 10^11 evaluations."""


def write_trained_rows(run: RunDir, rows: SourceRows, *, started_from: Iterable[str | None]) -> None:
    """Write down which rows `run` learns from, with those of the models that it started from.

    Raises:
        StorageError: The folder can't be written.
    """
    digests = {_digest(prompt, answer) for prompt, answer in _iter_learned(rows.train, rows.fmt)}
    for model in filter(None, started_from):
        digests |= _read_digests(model) or set()
    write_bytes(run.trained_rows, b"".join(sorted(digests)))


def count_trained_rows(model: str | Path, rows: Iterable[BenchmarkRow]) -> int | None:
    """Return how many rows have a prompt and an answer that a model learned from; None where nothing tells.

    Args:
        model: A run, or a model or an adapter in its folder.
        rows: What the model is asked.
    """
    digests = _read_digests(model)
    if digests is None:
        return None
    return sum(any(_digest(row.prompt, answer) in digests for answer in row.references) for row in rows)


def _iter_learned(rows: Iterable[Row], fmt: PromptFormat) -> Iterator[tuple[Prompt, str]]:
    """Yield what is learned as an evaluation would ask it."""
    if fmt.kind in HEAD_KINDS:
        return ((row.prompt, answer) for row in iter_head_rows(rows, fmt) for answer in row.references)
    pairs = (read_pair(row, fmt, fmt) for row in rows)
    return ((prompt, answer) for prompt, answer in pairs if prompt or fmt.kind != "messages")


def _read_digests(model: str | Path) -> set[bytes] | None:
    folder = Path(model)
    for place in (folder, folder.parent) if folder.is_dir() else ():
        if (file := RunDir(place).trained_rows).is_file():
            content = file.read_bytes()
            return {content[start : start + _BYTES] for start in range(0, len(content), _BYTES)}
    return None


def _digest(prompt: Prompt, answer: str) -> bytes:
    """Return what tells a row by its texts: a turn may hold more, of any type and another in each kind of file."""
    asked = prompt if isinstance(prompt, str) else [[turn["role"], turn["content"]] for turn in prompt]
    return blake2b(json.dumps([asked, answer]).encode(), digest_size=_BYTES).digest()
