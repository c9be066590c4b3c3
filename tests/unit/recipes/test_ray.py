"""Runs on a Ray cluster end as they do on processes. It takes Ray, which the extra of that name installs."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest
import yaml

from smolora.errors import BrokenRunError, ConfigError, StoppedBySignal, StorageError
from smolora.recipes.run_pool import run_on_ray
from smolora.runtime.signals import deferred_signals
from tests.tiny import save_tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray isn't installed"),
]


def place_of(number):
    return number, str(Path.cwd())


def fail(_):
    raise BrokenRunError("it broke")


def die(_):
    os.kill(os.getpid(), signal.SIGKILL)


def wait_to_be_told(folder_and_parent):
    """Have the parent stopped, and leave a file once this is told to stop too."""
    folder, parent = folder_and_parent
    with deferred_signals() as stop:
        os.kill(parent, signal.SIGTERM)
        deadline = time.monotonic() + 60
        while not stop.signal_name and time.monotonic() < deadline:
            time.sleep(0.05)
    Path(folder, str(stop.signal_name)).touch()


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster of this machine with a secret of its own; it lives elsewhere."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex, "RAY_USAGE_STATS_ENABLED": "0"}
    words = ["start", "--head", "--block", "--num-cpus=2", "--include-dashboard=false", f"--port={port}"]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ray") as folder:
        for name, value in secret.items():
            patch.setenv(name, value)
        command = [Path(sys.executable).with_name("ray"), *words, "--node-ip-address=127.0.0.1", f"--temp-dir={folder}"]
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as head:
            wait_for_port(port)
            yield f"127.0.0.1:{port}"
            head.terminate()


def wait_for_port(port):
    deadline = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert time.monotonic() < deadline, "the cluster didn't start"
            time.sleep(0.1)


def test_work_is_done_where_the_command_was_given(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = sorted(run_on_ray(place_of, [1, 2, 3], address=cluster))
    assert found == [(number, str(tmp_path)) for number in (1, 2, 3)]


def test_an_error_of_a_run_keeps_its_kind_and_words(cluster):
    with pytest.raises(BrokenRunError, match=r"^it broke$"):
        list(run_on_ray(fail, [1, 2], address=cluster))


def test_a_killed_worker_is_said_to_be_one(cluster):
    with pytest.raises(StorageError, match="a worker died"):
        list(run_on_ray(die, [1], address=cluster))


def test_a_signal_stops_the_workers_too_and_is_as_before_afterwards(cluster, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedBySignal, match="stopped by SIGTERM. The same command goes on"):
        list(run_on_ray(wait_to_be_told, [(str(tmp_path), os.getpid())], address=cluster))
    assert [file.name for file in tmp_path.iterdir()] == ["SIGINT"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_where_no_cluster_is_that_is_said_at_once():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ConfigError, match=f"no cluster at '127.0.0.1:{port}'"):
        list(run_on_ray(place_of, [1], address=f"127.0.0.1:{port}"))


def test_a_comparison_with_relative_paths_finds_on_a_cluster_what_it_finds_here(cluster, tmp_path):
    save_tiny_model("llama", tmp_path / "base")
    pairs = [{"prompt": f"the {a} of {b}", "completion": f"{b} {a}"} for a in "abcdefgh" for b in "klmnopqr"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    settings = {"model": {"name_or_path": "base", "dtype": "float32"}, "data": {"sources": "rows.jsonl"}}
    for name, rank in (("one", 1), ("two", 2)):
        rest = {"training": {"learning_rate": 1e-2, "max_steps": 4}, "adapter": {"r": rank}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings | rest))
    words = ["compare", "one.yaml", "two.yaml", "--seeds", "2", "--json", "-o"]
    command = [sys.executable, "-m", "smolora.cli", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # As Ray's workers have, since sums depend on it.
    found = []
    for place in (["on-ray", "--ray", cluster], ["here"]):
        done = subprocess.run(
            [*command, *place], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(done.stdout))
    assert found[0] == found[1]
