"""The report is written beside the run or where it is asked for, and never costs a run its end."""

from __future__ import annotations

import logging

import pytest

from smolora.errors import ConfigError, DataError, FolderInUseError, StorageError
from smolora.recipes.report import leave_report, report
from smolora.records.run_dir import RunDir
from tests.run_folders import write_run

PLOTS = {
    "training_loss.png",
    "gradient_norms.png",
    "layer_comparison.png",
    "layer_heatmap.png",
    "gradient_evolution.png",
}


@pytest.fixture
def run(tmp_path):
    return RunDir(write_run(tmp_path / "run", phases=(("both", 4), ("mlp", 8))))


@pytest.mark.usefixtures("painted_reports")
def test_the_report_of_one_run_lies_in_it(run):
    assert report([run.path]) == run.report
    assert {file.name for file in run.plots.iterdir()} == PLOTS
    assert run.report.read_text().startswith("<!doctype html>")


@pytest.mark.usefixtures("painted_reports")
def test_several_runs_need_a_place(tmp_path, run):
    other = write_run(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"-o is missing: the folder for a report of several runs"):
        report([run.path, other])
    place = tmp_path / "comparison"
    assert report([run.path, other], place) == place / "report.html"
    assert {file.name for file in place.iterdir()} == {"plots", "report.html"}
    assert not run.report.exists()


def test_a_comparison_is_not_written_into_a_run(tmp_path, run):
    other = write_run(tmp_path / "other")
    own = report([run.path]).read_bytes()
    for runs in ([run.path, other], [other]):
        with pytest.raises(ConfigError, match="holds a run, whose own report would be replaced"):
            report(runs, run.path)
    assert run.report.read_bytes() == own
    assert report([run.path], run.path) == run.report


def test_files_of_others_in_the_place_stay(tmp_path, run):
    mine = tmp_path / "place" / "plots" / "mine.png"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    report([run.path], tmp_path / "place")
    report([run.path], tmp_path / "place")
    assert mine.read_bytes() == b"mine"


def test_a_run_that_is_being_trained_is_not_written_into(run):
    with run.locked():
        with pytest.raises(FolderInUseError, match="Choose another output folder"):
            report([run.path])
        assert report([run.path], run.path.parent / "elsewhere").is_file()


def test_a_missing_run_leaves_nothing(tmp_path, run):
    with pytest.raises(DataError, match="holds no run"):
        report([run.path, tmp_path / "no"], tmp_path / "place")
    assert not (tmp_path / "place").exists()


def test_a_place_that_is_a_file_is_said(tmp_path, run):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="can't write"):
        report([run.path], tmp_path / "file")


def test_the_end_of_a_run_leaves_a_report_and_says_where(run, caplog):
    with caplog.at_level(logging.INFO, logger="smolora"):
        leave_report(run)
    assert caplog.messages == [f"report: {run.report}"]
    assert run.report.is_file()


def test_a_report_that_cannot_be_written_is_a_warning_with_the_reason(run, caplog):
    run.plots.write_text("a file stands where the folder should")
    leave_report(run)
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert f"no report was written: can't write {run.plots}" in record.getMessage()
    assert ". The run is whole" in record.getMessage()
    assert ".." not in record.getMessage()


def test_a_run_without_metrics_is_a_warning(run, caplog):
    run.metrics.unlink()
    leave_report(run)
    assert "no report was written: " in caplog.text
