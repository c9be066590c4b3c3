"""A benchmark's split as rows to learn from."""

from __future__ import annotations

import json

import pytest

from smolora.config import DataConfig
from smolora.data.benchmark_source import name_sources
from smolora.data.sources import check_sources, read_sources
from smolora.errors import DataError


@pytest.fixture
def sick(tmp_path):
    for name, label in (("train", "neutral"), ("trial", "entailment")):
        row = {"premise": "P", "hypothesis": "H", "label": label}
        (tmp_path / f"sick_{name}.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


def test_training_and_held_out_rows_are_prompts_and_completions(sick):
    settings = name_sources("sick", sick)
    data = DataConfig(sources=settings["data.sources"], eval_source=settings["data.eval_source"])
    check_sources(data)
    rows = read_sources(data, seed=0)
    assert rows.fmt.kind == "prompt_completion"
    prompt = "Premise: P\nHypothesis: H\nRelation:"
    assert [row.values for row in rows.train] == [{"prompt": prompt, "completion": "neutral"}]
    assert [row.values for row in rows.held_out] == [{"prompt": prompt, "completion": "entailment"}]


def test_every_reference_is_a_row(tmp_path):
    for name in ("trainset.csv", "devset.csv"):
        (tmp_path / name).write_text("mr,ref\nA,1\nA,2\n")
    data = DataConfig(sources=name_sources("e2e", tmp_path)["data.sources"])
    assert [row.values["completion"] for row in read_sources(data, seed=0).train] == ["1", "2"]


def test_what_isnt_there_is_said_before_a_model_is_loaded(tmp_path):
    with pytest.raises(DataError, match=r"has none of sick_train\.jsonl, which sick needs"):
        name_sources("sick", tmp_path)
    for source in ("benchmark:sick", f"benchmark:sick:train:{tmp_path}"):
        with pytest.raises(DataError):
            check_sources(DataConfig(sources=(source,)))
