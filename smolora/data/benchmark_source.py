"""A benchmark's split as a source of rows to learn from: `benchmark:NAME:SPLIT:FOLDER`, as any path or hub id."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from smolora.data.benchmarks import Benchmark, get_benchmark
from smolora.data.row_stream import Source
from smolora.data.rows import Reject, Row, check_values
from smolora.errors import DataError

_PREFIX = "benchmark:"


def is_benchmark_source(source: str) -> bool:
    """Whether a source names a benchmark's split."""
    return source.startswith(_PREFIX)


def name_sources(name: str, folder: Path) -> dict[str, object]:
    """Return the settings for training on a benchmark: its training rows, and its held-out ones where it has some.

    Raises:
        ConfigError: There is no such benchmark.
        DataError: A file of it isn't in `folder`.
    """
    benchmark = get_benchmark(name)
    splits = [split for split in ("train", "validation") if split in benchmark.files]
    for split in splits:
        benchmark.find(split, folder)
    learned, *held_out = (f"{_PREFIX}{benchmark.name}:{split}:{folder}" for split in splits)
    return {"data.sources": (learned,), **({"data.eval_source": held_out[0]} if held_out else {})}


def find_benchmark(source: str) -> Benchmark | None:
    """Return the benchmark whose rows a source names; None where it is a path or a hub id."""
    return get_benchmark(_part(source)[0]) if is_benchmark_source(source) else None


def locate_benchmark(source: str) -> Path:
    """Return the file of a source that names a benchmark's split.

    Raises:
        ConfigError: There is no such benchmark or split.
        DataError: The source isn't of that form, or the file isn't there.
    """
    name, split, folder = _part(source)
    return get_benchmark(name).find(split, folder)


def open_benchmark_source(source: str) -> Source:
    """Open a source that names a benchmark's split, with a row of `prompt` and `completion` for each reference.

    Raises:
        ConfigError, DataError: As `locate_benchmark`.
    """
    name, split, _ = _part(source)
    file = locate_benchmark(source)

    def read() -> Iterator[Row | Reject]:
        rows = get_benchmark(name).iter_rows(split, file)
        pairs = ((row.prompt, reference) for row in rows for reference in row.references)
        for number, (prompt, reference) in enumerate(pairs, start=1):
            yield check_values({"prompt": prompt, "completion": reference}, str(file), number)

    return Source(source, read)


def _part(source: str) -> tuple[str, str, str]:
    parts = source.removeprefix(_PREFIX).split(":", 2)
    if len(parts) != 3:
        raise DataError(f"{source} isn't {_PREFIX}NAME:SPLIT:FOLDER.")
    return parts[0], parts[1], parts[2]
