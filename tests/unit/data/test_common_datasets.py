"""The table of usual datasets is the benchmarks' own, and says truly how they are loaded."""

from __future__ import annotations

import json

from smolora.data.benchmarks import BENCHMARKS
from smolora.data.common_datasets import COMMON_DATASETS


def test_every_benchmark_is_in_the_table_with_what_it_has():
    assert list(COMMON_DATASETS) == list(BENCHMARKS)
    tasks = {name: dataset.task for name, dataset in COMMON_DATASETS.items()}
    assert (tasks["e2e_nlg"], tasks["sick"], tasks["squad"]) == ("causal_lm", "classification", "qa")
    assert COMMON_DATASETS["sick"].labels == BENCHMARKS["sick"].labels
    assert [name for name, dataset in COMMON_DATASETS.items() if dataset.can_download] == [
        "e2e_nlg",
        "wikisql",
        "squad",
    ]
    assert COMMON_DATASETS["squad"].splits == ("train", "test")


def test_rows_have_the_columns_that_the_table_says_and_that_its_settings_name(tmp_path):
    rows = [{"dialogue": f"A: hello {number}", "summary": "A greets."} for number in range(3)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = COMMON_DATASETS["samsum"]
    found = dataset.load(data_dir=tmp_path, num_samples=2)
    assert tuple(found.column_names) == dataset.columns
    assert found.num_rows == 2
    assert {dataset.data.prompt_field, dataset.data.completion_field} == set(dataset.columns)


def test_a_classifiers_settings_name_a_text_and_a_label():
    data = COMMON_DATASETS["sst2"].data
    assert (data.text_field, data.label_field) == ("prompt", "completion")
