"""A comparison that is killed leaves no worker behind, and the same command continues it to the same result."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from smolora.records.run_dir import RunDir
from tests.tiny import save_tiny_model


def is_alive(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def descendants_of(pid):
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    children = [int(word) for word in listed.stdout.split()]
    return children + [further for child in children for further in descendants_of(child)]


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
    return found


@pytest.mark.slow
def test_a_killed_comparison_continues(tmp_path):
    base, rows, out = save_tiny_model("llama", tmp_path / "base"), tmp_path / "rows.jsonl", tmp_path / "out"
    pairs = [{"prompt": f"the {a} of {b}", "completion": f"{b} {a}"} for a in "abcdefgh" for b in "klmnopqr"]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    settings = {
        "model": {"name_or_path": str(base), "dtype": "float32"},
        "data": {"sources": [str(rows)]},
        "training": {"learning_rate": 1e-2, "max_steps": 40, "save_steps": 2},
    }
    for name in ("one", "twin"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    files = [str(tmp_path / f"{name}.yaml") for name in ("one", "twin")]
    words = ["compare", *files, "-o", str(out), "--seeds", "2", "--workers", "2", "--json"]
    command = [sys.executable, "-m", "smolora.cli", *words]

    def finished():
        return list(out.glob("*/seed-*/outcome.json"))

    def torn():
        return [folder for folder in out.glob("*/seed-1") if RunDir(folder).checkpoints()]

    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as killed:
        wait_for(lambda: finished() and torn())
        workers = descendants_of(killed.pid)
        killed.send_signal(signal.SIGKILL)
    assert len(workers) >= 2, "two workers at least"
    wait_for(lambda: not any(map(is_alive, workers)))
    kept = {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in finished()}
    assert 0 < len(kept) < 4, "it was killed between its runs"
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{len(kept)} of 4 runs are finished already" in done.stderr
    assert {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in kept} == kept
    one, twin = json.loads(done.stdout)["standings"]
    assert one["losses"] == twin["losses"], "a run that was killed and one that was not end alike, to the bit"
    assert (out / "comparison.png").is_file()
