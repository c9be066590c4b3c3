"""Benchmarks: files found by the names that people have them under, and their rows."""

from __future__ import annotations

import pytest

from smolora.config import DataConfig
from smolora.data.benchmarks import (
    BENCHMARKS,
    DatasetType,
    find_benchmark_files,
    get_benchmark,
    load_and_preprocess_dataset,
)
from smolora.data.prompts import resolve_prompt_format
from smolora.errors import ConfigError, DataError
from tests.unit.data.conftest import require_shared


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


@pytest.mark.parametrize(
    ("name", "split", "folder", "num_rows"),
    [
        ("e2e_nlg", "validation", "e2e", 547),
        ("e2e_nlg", "test", "e2e", 630),
        ("samsum", "test", "samsum", 819),
        ("wikisql", "validation", "wikisql", 8421),
        ("multi_nli", "test", "nli", 1000),
        ("sst2", "test", "textcls", 1821),
        ("ag_news", "test", "textcls", 7600),
        ("sick", "test", "nli", 4906),
        ("squad", "test", "qa", 1190),
    ],
)
def test_every_benchmark_reads_its_real_files(name, split, folder, num_rows):
    benchmark = get_benchmark(name)
    rows = list(benchmark.iter_rows(split, benchmark.find(split, require_shared(f"data/{folder}"))))
    assert len(rows) == num_rows
    assert all(row.prompt and row.references for row in rows)
    assert not benchmark.labels or {row.references[0] for row in rows} == set(benchmark.labels)


def test_a_benchmark_is_a_dataset_that_train_recognises():
    folder = require_shared("data/e2e")
    dataset = load_and_preprocess_dataset(DatasetType.E2E_NLG, data_dir=folder, split="test", num_samples=2)
    assert dataset.column_names == ["prompt", "completion"]
    assert len(set(dataset["prompt"])) == 2 < len(dataset)
    assert resolve_prompt_format(dataset.column_names, DataConfig()).kind == "prompt_completion"


def test_unknown_names_are_refused_with_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'samsum'"):
        get_benchmark("samsun")
    with pytest.raises(ConfigError, match="squad has no split 'validation'. Splits: train, test"):
        get_benchmark("squad").find("validation", tmp_path)


def test_dataset_types_are_the_names_of_the_table():
    assert list(BENCHMARKS) == list(DatasetType)
