"""A run's files become arrays: gaps stay gaps, half a line is left out, and what is missing is said."""

from __future__ import annotations

import json

import numpy as np
import pytest

from smolora.analysis.run_record import RunRecord, find_phases
from smolora.errors import DataError
from tests.run_folders import write_run


@pytest.fixture
def phased(tmp_path):
    return write_run(tmp_path / "run", phases=(("both", 4), ("mlp", 8), ("late", 12)))


def test_frozen_groups_are_nan_and_not_zero(phased):
    attention = RunRecord(phased).group_norms.columns["attention"]
    assert np.isnan(attention[4:8]).all()
    assert np.isfinite(attention[:4]).all()
    assert np.isfinite(attention[8:]).all()


def test_groups_that_were_never_trained_are_left_out(phased):
    assert list(RunRecord(phased).group_norms.groups) == ["attention", "mlp"]


def test_layers_are_rows_by_their_number(phased):
    layers = RunRecord(phased).layer_norms.layers
    assert layers["mlp"].shape == (3, 12)
    np.testing.assert_allclose(layers["mlp"][:, 0], [2, 4, 6])
    assert np.isnan(layers["mlp"][0, 8:]).all()


def test_phases_meet_halfway_between_their_logged_steps():
    spans = find_phases([1, 10, 20, 30], ["1", "1", "2", "2"])
    assert [(span.first, span.last, span.start, span.end) for span in spans] == [(1, 10, 1, 15), (20, 30, 15, 30)]


def test_phases_meet_where_the_run_says_however_sparse_its_log_is(tmp_path):
    steps, names = [1, 10, 20, 30], ["1", "1", "2", "2"]
    assert [(span.start, span.end) for span in find_phases(steps, names, {"2": 12})] == [(1, 12.5), (12.5, 30)]
    assert find_phases(steps, names, {"2": 40}) == find_phases(steps, names), "a start outside can't be"
    run = write_run(tmp_path / "run", phases=(("both", 4), ("mlp", 8)))
    (run / "phase_report.json").write_text(json.dumps({"starts": [0, 4], "phases": []}))
    lines = run.joinpath("metrics.jsonl").read_text().splitlines(keepends=True)
    run.joinpath("metrics.jsonl").write_text(lines[0] + lines[7])
    assert [(span.start, span.end) for span in RunRecord(run).phases] == [(1, 4.5), (4.5, 8)]


def test_a_run_of_one_phase_has_none_to_show(tmp_path):
    assert RunRecord(write_run(tmp_path / "run")).phases == []


def test_a_line_that_is_being_written_is_left_out(phased):
    file = phased / "gradient_analysis.group_norms.csv"
    whole = len(RunRecord(phased).group_norms.steps)
    file.write_text(file.read_text() + "13,3,300,0.1")
    assert len(RunRecord(phased).group_norms.steps) == whole


def test_a_damaged_gradient_log_is_said(phased):
    file = phased / "gradient_analysis.group_norms.csv"
    file.write_text(file.read_text().replace("\n3,1,", "\n3,1,x"))
    with pytest.raises(DataError, match=r"group_norms.csv is damaged: .*Remove it"):
        _ = RunRecord(phased).group_norms


def test_a_file_of_other_columns_is_said(phased):
    (phased / "gradient_analysis.group_norms.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"must begin with step, phase; found \['a', 'b'\]"):
        _ = RunRecord(phased).group_norms


def test_a_folder_without_a_run_is_said(tmp_path):
    with pytest.raises(DataError, match=r"holds no run: there is no metrics.jsonl\. Name"):
        RunRecord(tmp_path)
    with pytest.raises(DataError, match=rf"metrics.jsonl\. Did you mean '{tmp_path}'"):
        RunRecord(tmp_path.with_name(f"{tmp_path.name}x"))


def test_a_lost_configuration_is_no_settings(phased):
    (phased / "resolved_config.yaml").write_text("a: [")
    assert RunRecord(phased).settings == {}


def test_settings_are_by_dotted_path(phased):
    assert RunRecord(phased).settings["training.learning_rate"] == 2e-4
