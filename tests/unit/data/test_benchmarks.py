"""The files of a benchmark, found by the names that people have them under."""

from __future__ import annotations

import pytest

from smolora.data.benchmarks import find_benchmark_files
from smolora.errors import DataError


@pytest.mark.parametrize(
    ("benchmark", "files"),
    [("e2e", ("trainset_rebuilt.csv.gz", "devset.csv")), ("samsum", ("train.jsonl.gz", "val.jsonl"))],
)
def test_the_files_of_both_splits_are_found(tmp_path, benchmark, files):
    for name in files:
        (tmp_path / name).touch()
    assert find_benchmark_files(benchmark, tmp_path) == tuple(tmp_path / name for name in files)


def test_a_missing_file_is_named_with_what_it_may_be_called(tmp_path):
    (tmp_path / "trainset.csv").touch()
    with pytest.raises(DataError, match=r"has none of devset\.csv, devset\.csv\.gz, which e2e needs"):
        find_benchmark_files("e2e", tmp_path)
