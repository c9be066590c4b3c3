"""A tiny model and rows that fit its context."""

from __future__ import annotations

from dataclasses import replace

import pytest

from smolora.data.benchmark_rows import BenchmarkRow
from smolora.data.prompts import PromptFormat
from tests.tiny import tiny_bundle

LABELS = ("yes", "no")


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    """A tiny llama that was tuned on prompts and completions, as far as its form goes."""
    fmt = PromptFormat(kind="prompt_completion", columns={"prompt": "mr", "completion": "ref"})
    return replace(tiny_bundle("llama", tmp_path_factory.mktemp("evaluation") / "base"), prompt_format=fmt)


@pytest.fixture
def rows():
    """Twenty rows of different lengths, some with two references."""
    return [
        BenchmarkRow(f"name {number}" + " the cat" * (number % 4), ("yes", "no it isn't")[: 1 + number % 2])
        for number in range(20)
    ]
