"""A report of several runs lays their curves over each other, and lists results and the settings that differ."""

from __future__ import annotations

import re

import pytest

from smolora.analysis.report import build_report
from smolora.analysis.run_record import RunRecord
from smolora.analysis.run_table import describe_runs
from tests.run_folders import SETTINGS, write_run

FASTER = {**SETTINGS, "training": {**SETTINGS["training"], "learning_rate": 1e-3}}


def build(*runs):
    return build_report([RunRecord(run) for run in runs])


def names(report):
    return [picture.name for picture in report.pictures]


@pytest.mark.usefixtures("painted_reports")
def test_one_run_is_drawn_whole(tmp_path):
    report = build(write_run(tmp_path / "run"))
    assert min(len(picture.png) for picture in report.pictures) > 5000, "painted, not white"
    assert names(report) == [
        "training_loss",
        "gradient_norms",
        "layer_comparison",
        "layer_heatmap",
        "gradient_evolution",
    ]
    assert report.notes == []
    assert ["training.learning_rate", "0.0002"] in report.table.rows


@pytest.mark.usefixtures("painted_reports")
def test_several_runs_are_laid_over_each_other_and_their_layers_shown_one_by_one(tmp_path):
    report = build(write_run(tmp_path / "a"), write_run(tmp_path / "b"))
    assert names(report) == [
        "training_loss",
        "gradient_norms",
        "layer_comparison",
        "layer_heatmap_1",
        "gradient_evolution_1",
        "layer_heatmap_2",
        "gradient_evolution_2",
    ]
    assert list(report.summaries) == ["1  a", "2  b"]
    assert report.title == "a and b"


def test_the_table_has_the_results_and_only_the_settings_that_differ(tmp_path):
    slow = write_run(tmp_path / "a", eval_losses={0: 4.0, 10: 2.5, 20: 2.6}, losses=[3.0] * 20)
    fast = write_run(tmp_path / "b", settings=FASTER, has_gradients=False)
    table = build(slow, fast).table
    assert table.head == ["", "1  a", "2  b"]
    assert {row[0]: row[1:] for row in table.rows} == {
        "last step": ["20", "20"],
        "last training loss": ["3.0000", "2.0366"],
        "lowest held-out loss": ["2.5000 at step 10", "-"],
        "input tokens per second, median": ["-", "-"],
        "training.learning_rate": ["0.0002", "0.001"],
    }


def test_a_plain_run_beside_a_phased_one_has_no_phases(tmp_path):
    runs = [
        write_run(tmp_path / name, settings={**SETTINGS, "phases": {"strategy": strategy, "table": []}})
        for name, strategy in (("a", None), ("b", "early,late"))
    ]
    assert ["phases.strategy", "no phases", "early,late"] in build(*runs).table.rows


def test_the_text_of_several_runs_begins_with_their_table_and_says_each_rule_once(tmp_path):
    text = describe_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", settings=FASTER)])
    table, _, second = text.split("\nWhat was trained\n")
    assert re.search(r"^training.learning_rate +0.0002 +0.001$", table, re.MULTILINE)
    assert table.endswith("\n1  a\n")
    assert (text.count("A stall is"), text.count("A spike is")) == (1, 1)
    assert "A stall is" in second


def test_runs_of_one_name_are_named_with_the_folder_they_are_in(tmp_path):
    report = build(*(write_run(tmp_path / path) for path in ("a/run", "b/run", "c/other")))
    assert list(report.summaries) == ["1  a/run", "2  b/run", "3  other"]


def test_what_is_missing_in_one_run_leaves_the_others_drawn(tmp_path):
    report = build(write_run(tmp_path / "a"), write_run(tmp_path / "b", has_gradients=False))
    assert names(report) == ["training_loss", "gradient_norms", "layer_heatmap_1", "gradient_evolution_1"]
    assert all("this run kept no gradient log" in note for note in report.notes)
    assert len(report.notes) == len(set(report.notes))
