"""gradient_analysis.*.csv: rows come back as written, torn lines are repaired, later steps are cut."""

from __future__ import annotations

import math

import pytest

from smolora.errors import DataError
from smolora.records.gradient_log import GradientNormLog
from smolora.records.gradient_summary import GradientSummary

GROUPS = {"attention": 0.1, "mlp": None, "embed": None, "lm_head": None, "total": 0.1}
LAYERS = {"layer_0_attention": 0.1, "layer_0_mlp": None}


@pytest.fixture
def log(tmp_path):
    return GradientNormLog(tmp_path)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "gradient_analysis.group_norms.csv"


def fill(log, *steps, groups=GROUPS):
    for step in steps:
        log.append(step, 1, 24, groups, LAYERS)


def test_a_frozen_group_is_an_empty_cell_and_comes_back_as_none(log, file):
    fill(log, 1)
    assert file.read_text() == "step,phase,active,attention,mlp,embed,lm_head,total\n1,1,24,0.1,,,,0.1\n"
    assert log.read_groups() == [{"step": 1, "phase": 1, "active": 24, **GROUPS}]
    assert log.read_layers() == [{"step": 1, "phase": 1, **LAYERS}]


def test_a_zero_stays_a_zero_and_what_is_not_finite_is_empty(log):
    fill(log, 1, groups={**GROUPS, "attention": 0.0, "mlp": math.inf})
    assert [log.read_groups()[0][name] for name in ("attention", "mlp")] == [0.0, None]


def test_a_float32_comes_back_exactly(log):
    value = 0.100000001490116119384765625
    fill(log, 1, groups={**GROUPS, "total": value})
    assert math.isclose(log.read_groups()[0]["total"], value, rel_tol=1e-8)


def test_further_groups_come_after_the_promised_columns(log, file):
    fill(log, 1, groups={"attention": 1.0, "mlp": 1.0, "embed": 1.0, "lm_head": None, "norm": 2.0, "total": 3.0})
    assert file.read_text().splitlines()[0] == "step,phase,active,attention,mlp,embed,lm_head,total,norm"


@pytest.mark.parametrize("torn", ["3,1", "3,1,24,0.1,,,,0.1", "\x00\x00"])
def test_a_torn_last_line_is_repaired_before_the_next_row(log, file, tmp_path, torn):
    fill(log, 1, 2)
    with file.open("a") as stream:
        stream.write(torn)
    assert [row["step"] for row in log.read_groups()] == [1, 2]
    fill(GradientNormLog(tmp_path), 3)
    assert [row["step"] for row in log.read_groups()] == [1, 2, 3]
    assert file.read_text().count("\n") == 4


def test_a_torn_header_is_written_anew(file, tmp_path):
    file.write_text("step,pha")
    log = GradientNormLog(tmp_path)
    fill(log, 1)
    assert [row["step"] for row in log.read_groups()] == [1]


def test_cutting_keeps_the_rows_up_to_a_step(log):
    fill(log, 1, 2, 3)
    log.cut(2)
    fill(log, 4)
    assert [row["step"] for row in log.read_groups()] == [1, 2, 4]
    assert [row["step"] for row in log.read_layers()] == [1, 2, 4]


def test_cutting_or_reading_nothing_is_nothing(log, tmp_path):
    log.cut(3)
    assert log.read_groups() == log.read_layers() == []
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_other_columns_is_not_continued(log, tmp_path):
    fill(log, 1)
    with pytest.raises(DataError, match="other columns than this run measures"):
        GradientNormLog(tmp_path).append(2, 1, 24, {**GROUPS, "norm": 1.0}, LAYERS)


def test_a_summary_goes_on_from_its_state_as_if_it_had_never_stopped():
    whole, first = GradientSummary(), GradientSummary()
    steps = {1: 0.5, 2: 2.0, 3: None, 4: 1.0}
    for step, norm in steps.items():
        whole.add(step, 1 + (step > 2), 24, {"groups/mlp/norm": norm})
        first.add(step, 1 + (step > 2), 24, {"groups/mlp/norm": norm}) if step < 3 else None
    second = GradientSummary.from_state(first.to_state())
    for step in (3, 4):
        second.add(step, 2, 24, {"groups/mlp/norm": steps[step]})
    assert second.to_dict({}) == whole.to_dict({})
    expected = {"count": 3, "mean": pytest.approx(3.5 / 3), "max": 2.0, "max_step": 2, "last": 1.0}
    assert whole.to_dict({})["groups"]["mlp"]["norm"] == expected
    phase = whole.to_dict({})["phases"]["2"]
    assert (phase["first_step"], phase["last_step"], phase["groups"]["mlp"]["norm"]["count"]) == (3, 4, 1)
