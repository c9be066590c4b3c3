"""Where a benchmark keeps its rows: the files of each split, in a folder that a person has downloaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from smolora.errors import DataError

_FILES: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
    "e2e": (("trainset.csv", "trainset.csv.gz", "trainset_rebuilt.csv.gz"), ("devset.csv", "devset.csv.gz")),
    "samsum": (("train.jsonl", "train.jsonl.gz", "train.json"), ("val.jsonl", "val.jsonl.gz", "val.json")),
}
"""Names of the training and the held-out rows; the first that is there is read."""


def find_benchmark_files(benchmark: str, folder: Path) -> tuple[Path, Path]:
    """Return the files of training and held-out rows.

    Raises:
        DataError: One of them isn't in `folder`.
    """
    train, held_out = (_find(benchmark, folder, names) for names in _FILES[benchmark])
    return train, held_out


def _find(benchmark: str, folder: Path, names: Sequence[str]) -> Path:
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise DataError(
            f"{folder} has none of {', '.join(names)}, which {benchmark} needs. "
            "Name the folder that holds them with --data-dir, or the files with --data and --eval-data."
        )
    return found
