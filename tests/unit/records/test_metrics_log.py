"""metrics.jsonl is valid JSON always, and one curve across a resume."""

from __future__ import annotations

import pytest

from smolora.records.metrics_log import MetricsLog


@pytest.fixture
def log(tmp_path):
    return MetricsLog(tmp_path / "metrics.jsonl")


def test_a_number_that_is_not_finite_is_null(log):
    log.append({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    assert log.path.read_text() == '{"step": 1, "loss": null, "grad_norm": null}\n'


def test_cutting_drops_later_steps_and_a_torn_line(log):
    for step in (1, 2, 3):
        log.append({"step": step})
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')
    log.cut(2)
    assert log.path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_cutting_a_log_that_does_not_exist_creates_nothing(log):
    log.cut(5)
    assert not log.path.exists()


def test_cutting_to_before_the_first_step_empties_the_file(log):
    for step in (0, 1):
        log.append({"step": step})
    log.cut(-1)
    assert log.path.read_text() == ""


def test_a_step_of_zero_stays_at_a_cut_to_zero(log):
    for step in (0, 1):
        log.append({"step": step})
    log.cut(0)
    assert log.read() == [{"step": 0}]


def test_a_line_after_a_cut_starts_a_line(log):
    log.append({"step": 1})
    with log.path.open("a") as file:
        file.write('{"step": 2')
    log.cut(1)
    log.append({"step": 2})
    assert log.read() == [{"step": 1}, {"step": 2}]


def test_a_line_that_is_half_written_at_the_first_look_is_read_at_the_second(log):
    log.append({"step": 1})
    with log.path.open("a") as file:
        file.write('{"step": 2, "lo')
        file.flush()
        first, end = log.read_new(0)
        file.write('ss": 1.0}\n')
    assert (first, log.read_new(end)[0]) == ([{"step": 1}], [{"step": 2, "loss": 1.0}])


@pytest.mark.parametrize("damage", [b"\xff\xfe\n", b"\x00\x00\n", b"7\n", b"null\n", b"[1]\n"])
def test_a_damaged_line_costs_that_line_alone(log, damage):
    log.append({"step": 1})
    with log.path.open("ab") as file:
        file.write(damage)
    log.append({"step": 2})
    log.cut(2)
    assert log.read() == [{"step": 1}, {"step": 2}]
