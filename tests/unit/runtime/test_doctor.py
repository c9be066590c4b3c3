"""The facts about a machine are there, and true."""

from __future__ import annotations

import importlib.metadata
import platform

import pytest
import torch

from smolora.runtime.doctor import describe_load, examine_machine


def test_each_choice_comes_with_its_reason(tmp_path):
    facts = dict(examine_machine(tmp_path))
    assert facts["device"].endswith(")")
    assert "(" in facts["base dtype"]
    assert facts["threads"].startswith(f"{torch.get_num_threads()} of ")
    assert facts["allocator"]
    assert str(tmp_path) in facts["disk"]
    assert "GiB" in facts["memory"]


def test_versions_are_the_installed_ones():
    facts = dict(examine_machine())
    assert f"peft {importlib.metadata.version('peft')}" in facts["libraries"]
    assert f"Python {platform.python_version()}" in facts["smolora"]


def test_every_optional_part_is_named_with_whether_it_is_installed():
    facts = dict(examine_machine())
    assert facts["optional: dev"] == "installed"  # It brought the test runner.


@pytest.mark.parametrize(("threads", "busy", "is_warned"), [(2, 0.4, False), (2, 1.2, True), (1, 3.0, False)])
def test_threads_that_other_work_would_stop_are_warned_of(threads, busy, is_warned):
    assert ("OMP_NUM_THREADS=1" in describe_load(threads, 2, busy)) == is_warned
