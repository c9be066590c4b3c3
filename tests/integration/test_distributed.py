"""Two processes under torchrun do what one does, leave one set of records, and end together."""

from __future__ import annotations

import fcntl
import json
import os
import re
from pathlib import Path

import pytest
import torch
import torch.distributed.run as torchrun
from safetensors.torch import load_file

from smolora.cli.app import run as run_command
from smolora.records.staging import hash_folder, read_manifest
from tests.forked import run_forked
from tests.integration.distributed_runs import STEPS, pretraining_words, tuning_words, write_files

WORKER = Path(__file__).with_name("distributed_worker.py")
# As forks of a fork of this process, which have imported all.
TORCHRUN = ["--standalone", "--nproc-per-node", "2", "--start-method", "fork", "--run-path"]


pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The folder of one launch, which the workers of pytest-xdist share: it takes most of this module's time."""
    run_id = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    base = tmp_path_factory.getbasetemp().parent / f"distributed-{run_id}" if run_id else tmp_path_factory.mktemp("two")
    base.mkdir(exist_ok=True)
    with (base / "lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        if not (base / "done").exists():
            write_files(base)
            assert run_forked(torchrun.main, [*TORCHRUN, str(WORKER), str(base)]) == 0
            (base / "done").touch()
    return base


@pytest.fixture(scope="module")
def alone(shared, tmp_path_factory):
    """A folder with what one process makes of the same command lines."""
    folder = tmp_path_factory.mktemp("one")
    assert run_command(["train", *tuning_words(shared), "-o", str(folder / "tune"), "--quiet"]) == 0
    assert run_command(["pretrain", *pretraining_words(shared), "-o", str(folder / "pretrain"), "--quiet"]) == 0
    return folder


def outcomes(shared, scenario):
    return [json.loads((shared / f"{scenario}-{rank}.json").read_text()) for rank in range(2)]


def exit_codes(shared, scenario):
    return [outcome["exit_code"] for outcome in outcomes(shared, scenario)]


def read_curve(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "loss", "grad_norm", "learning_rate", "tokens", "input_tokens", "phase", "eval_loss")
    return [{name: line[name] for name in names if name in line} for line in lines]


def read_phases(folder):
    phases = json.loads((folder / "phase_report.json").read_text())["phases"]
    return [(phase["start"], phase["end"], phase["declared"], phase["problems"]) for phase in phases]


def assert_same_tensors(first, second, *, tolerance):
    first, second = load_file(first), load_file(second)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=tolerance, rtol=0)


def test_a_tuning_run_of_two_processes_equals_that_of_one(shared, alone):
    """Phases, accumulation, rows of uneven lengths, and steps in which a process has no row: rounding alone differs."""
    assert exit_codes(shared, "tune") == [0, 0]
    name = "adapter_checkpoint/adapter_model.safetensors"
    assert_same_tensors(alone / "tune" / name, shared / "tune" / name, tolerance=1e-6)


def test_the_curve_of_two_processes_is_that_of_one(shared, alone):
    curves = read_curve(alone / "tune"), read_curve(shared / "tune")
    assert [line["step"] for line in curves[1]] == list(range(STEPS + 1))
    for one, two in zip(*curves, strict=True):
        assert two == pytest.approx(one, rel=1e-6)


def test_phases_of_two_processes_are_those_of_one(shared, alone):
    found = read_phases(shared / "tune")
    assert found == read_phases(alone / "tune")
    assert [(start, end) for start, end, *_ in found] == [(0, 2), (2, 5), (5, 7)]


def test_gradient_norms_are_those_of_the_whole_step(shared, alone):
    one, two = (
        (folder / "tune" / "gradient_analysis.group_norms.csv").read_text().splitlines() for folder in (alone, shared)
    )
    assert one[0] == two[0]
    for row_of_one, row_of_two in zip(one[1:], two[1:], strict=True):
        numbers = [[float(cell or "nan") for cell in row.split(",")] for row in (row_of_one, row_of_two)]
        assert numbers[1] == pytest.approx(numbers[0], rel=1e-5, nan_ok=True)


def test_a_pretraining_run_of_two_processes_equals_that_of_one(shared, alone):
    assert exit_codes(shared, "pretrain") == [0, 0]
    assert_same_tensors(
        alone / "pretrain/model/model.safetensors", shared / "pretrain/model/model.safetensors", tolerance=1e-6
    )


def test_a_run_of_two_processes_leaves_the_files_of_a_run_of_one(shared, alone):
    one, two = (sorted(path.name for path in (folder / "tune").rglob("*")) for folder in (alone, shared))
    assert two == one


def test_the_main_process_alone_says_anything(shared):
    main, other = outcomes(shared, "tune")
    assert f"{STEPS}/{STEPS}" in main["said"]
    assert other["said"] == ""


def test_the_number_of_processes_is_recorded(shared):
    assert json.loads((shared / "tune/env.json").read_text())["processes"] == "2"
    assert read_manifest(shared / f"tune/step-{STEPS:06}")["processes"] == 2


@pytest.mark.parametrize(
    ("scenario", "exit_code", "words"),
    [
        ("existing", 2, "already holds a run"),
        ("uneven", 2, "9 rows a step can't be split evenly"),
        ("verb", 2, "this verb takes one process"),
        ("rejects", 3, "can't be used"),
    ],
)
def test_a_mistake_ends_all_processes_with_one_code_and_is_said(shared, scenario, exit_code, words):
    assert exit_codes(shared, scenario) == [exit_code, exit_code]
    assert re.search(words, outcomes(shared, scenario)[0]["said"])


@pytest.mark.parametrize("scenario", ["existing", "rejects"])
def test_what_the_main_process_has_said_is_not_said_twice(shared, scenario):
    assert outcomes(shared, scenario)[1]["said"] == ""


def test_rejected_rows_are_listed_once(shared):
    assert len((shared / "rejects/rejects.jsonl").read_text().splitlines()) == 1


def test_a_full_disk_of_the_main_process_ends_the_others(shared):
    assert exit_codes(shared, "disk") == [5, 5]
    assert "process 0: OSError: [Errno 28] No space left" in outcomes(shared, "disk")[1]["said"]


def test_a_failure_of_another_process_ends_the_main_one(shared):
    main = outcomes(shared, "second")[0]
    assert main["exit_code"] == 1
    assert main["said"] == "process 1: ValueError: a mistake of the second process"


def test_a_number_that_is_not_finite_in_one_process_ends_all(shared):
    assert exit_codes(shared, "nan") == [6, 6]
    assert "not finite first in parameter" in outcomes(shared, "nan")[0]["said"]


def test_a_callback_of_one_process_ends_the_run_of_all(shared):
    assert exit_codes(shared, "early") == [0, 0]
    assert read_curve(shared / "early")[-1]["step"] == 2


def test_processes_that_read_other_rows_are_refused(shared):
    assert exit_codes(shared, "other_rows") == [3, 3]
    assert "process 1 has other data than process 0" in outcomes(shared, "other_rows")[0]["said"]


def test_a_signal_to_one_process_stops_all_at_the_same_step(shared):
    assert exit_codes(shared, "stopped") == [75, 75]
    assert "stopped by SIGTERM after step 3" in outcomes(shared, "stopped")[0]["said"]


def test_a_signal_to_one_process_cuts_the_evaluation_of_all_and_the_resumed_run_makes_it(shared):
    assert exit_codes(shared, "cut") == [75, 75]
    assert exit_codes(shared, "cut_resumed") == [0, 0]
    assert hash_folder(shared / "cut/adapter_checkpoint") == hash_folder(shared / "tune/adapter_checkpoint")
    assert read_curve(shared / "cut") == read_curve(shared / "tune")


def test_a_resumed_run_of_two_processes_ends_with_the_bits_of_one_that_never_stopped(shared):
    assert exit_codes(shared, "resumed") == [0, 0]
    assert hash_folder(shared / "stopped/adapter_checkpoint") == hash_folder(shared / "tune/adapter_checkpoint")
    assert read_curve(shared / "stopped") == read_curve(shared / "tune")


def test_a_run_of_two_processes_is_not_resumed_by_one(shared, capsys):
    before = hash_folder(shared / "tune")
    assert run_command(["train", "-o", str(shared / "tune"), "--resume"]) == 2
    assert "was written by a run of 2 processes, and this one has 1" in capsys.readouterr().err
    assert hash_folder(shared / "tune") == before


def test_processes_that_failed_can_run_again(shared):
    assert exit_codes(shared, "again") == [0, 0]
    assert hash_folder(shared / "again/adapter_checkpoint") == hash_folder(shared / "tune/adapter_checkpoint")


def test_the_main_process_merges_and_all_may_ask_what_it_saved(shared):
    assert exit_codes(shared, "saved") == [0, 0]
    assert outcomes(shared, "saved")[0] == outcomes(shared, "saved")[1]
    assert exit_codes(shared, "saved_again") == [2, 2], "it is there"


def test_a_sharded_run_that_was_stopped_and_resumed_equals_that_of_one_process(shared, alone):
    """Phases, accumulation, recomputed activations after the stop, and a step in which one process has no row."""
    assert exit_codes(shared, "sharded") == [75, 75]
    assert exit_codes(shared, "sharded_resumed") == [0, 0]
    name = "adapter_checkpoint/adapter_model.safetensors"
    assert_same_tensors(alone / "tune" / name, shared / "sharded" / name, tolerance=1e-6)


def test_the_curve_of_a_sharded_run_is_that_of_one_process(shared, alone):
    for one, two in zip(read_curve(alone / "tune"), read_curve(shared / "sharded"), strict=True):
        assert two == pytest.approx(one, rel=1e-6)
    assert read_phases(shared / "sharded") == read_phases(alone / "tune")


def test_a_sharded_base_lies_by_halves_in_two_processes(shared):
    counts = [json.loads(outcome["said"]) for outcome in outcomes(shared, "sharded")]
    assert counts[0][0] == counts[1][0] == counts[0][1] + counts[1][1]
    assert counts[0][1] == counts[1][1]


def test_after_a_sharded_run_the_main_process_has_the_whole_model_for_the_verdict(shared):
    verdict = json.loads((shared / "sharded/verdict.json").read_text())
    best = min(line["eval_loss"] for line in read_curve(shared / "sharded") if "eval_loss" in line)
    assert verdict["loss"]["tuned"] == pytest.approx(best, rel=1e-5)


def test_a_number_that_is_not_finite_ends_a_sharded_run_with_its_place(shared):
    assert exit_codes(shared, "sharded_nan") == [6, 6]
    assert "not finite first in parameter" in outcomes(shared, "sharded_nan")[0]["said"]


@pytest.mark.parametrize("scenario", ["sharded_full", "sharded_pretrain"])
def test_a_model_that_is_trained_as_a_whole_is_not_sharded(shared, scenario):
    assert exit_codes(shared, scenario) == [2, 2]
    assert "Train an adapter" in outcomes(shared, scenario)[0]["said"]
    assert not (shared / scenario).exists()


def test_a_failure_inside_a_sharded_model_ends_the_other_process(shared):
    main, other = outcomes(shared, "inside")
    assert other["said"] == "a mistake of the second process"
    assert main["exit_code"] == 1
    # Gloo says it in several ways: "Connection closed by peer", "Read error ...: Connection reset by peer".
    assert re.match(r"another process of the run is gone \(.*Connection ", main["said"])
