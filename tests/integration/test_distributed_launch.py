"""Real launchers: accelerate's, a signal to torchrun, and a kill of the whole group. A launch takes many seconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from smolora.records.run_dir import RunDir
from smolora.records.staging import hash_folder
from tests.integration.distributed_runs import tuning_words, write_files

pytestmark = pytest.mark.slow

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
ONE_MACHINE = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
STEPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    write_files(folder)
    return folder


def words(folder, name, *more, steps=STEPS):
    return [
        *("-m", "smolora.cli", "train", *tuning_words(folder), "-o", str(folder / name)),
        *(f"training.max_steps={steps}", "training.save_steps=5", *more),
    ]


def launch(command):
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)


@contextmanager
def running(command, folder, *, lines):
    """Yield the launcher and its processes when the run's curve has so many lines; then wait for the launcher's end."""
    launcher = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < lines:
        assert launcher.poll() is None, launcher.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    yield launcher, [int(child) for child in children]
    launcher.communicate(timeout=120)


@pytest.fixture(scope="module")
def whole(folder):
    """The adapter of a run of two processes that never stopped."""
    done = launch([*TORCHRUN, *words(folder, "whole")])
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Warning" not in done.stderr
    return hash_folder(folder / "whole/adapter_checkpoint")


def resume(folder, name):
    done = launch([*TORCHRUN, *words(folder, name, "--resume")])
    assert done.returncode == 0, done.stderr[-4000:]
    return hash_folder(folder / name / "adapter_checkpoint")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_stops_the_run_after_a_step_and_it_goes_on_to_the_same_bits(folder, whole, number):
    name = number.name
    with running([*TORCHRUN, *words(folder, name)], folder / name, lines=8) as (launcher, _):
        launcher.send_signal(number)
    last = json.loads((folder / name / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    # The eighth update is evaluated: where the signal cuts that short, a resumed run writes its line.
    assert RunDir(folder / name).newest_checkpoint().step in (last, last + 1)
    assert resume(folder, name) == whole


def test_a_killed_group_goes_on_to_the_same_bits(folder, whole):
    with running([*TORCHRUN, *words(folder, "killed")], folder / "killed", lines=9) as (launcher, children):
        for process in (launcher.pid, *children):
            os.kill(process, signal.SIGKILL)
    assert resume(folder, "killed") == whole


def test_accelerate_launches_two_processes_on_cpus(folder):
    launcher = [*ACCELERATE, "--multi_gpu", *ONE_MACHINE, "--main_process_port", "0"]
    done = launch([*launcher, *words(folder, "accelerate", steps=7)])
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((folder / "accelerate/env.json").read_text())["processes"] == "2"


def test_accelerate_that_starts_one_process_of_two_is_refused(folder):
    done = launch([*ACCELERATE, "--cpu", *ONE_MACHINE, *words(folder, "one_of_two")])
    assert "accelerate launch was asked for several processes and started only one" in done.stderr
    assert not (folder / "one_of_two").exists()
