"""A tuning run that is killed at random moments and resumed each time leaves the adapter of one that never stopped."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.tiny import save_tiny_model

NUMBERS = ["one", "two", "three", "four", "five", "six"]


@pytest.mark.parametrize("kills", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_random_kills_of_a_recipe_change_no_byte_of_the_adapter(tmp_path, kills):
    base, rows = save_tiny_model("llama", tmp_path / "base"), tmp_path / "rows.jsonl"
    pairs = [
        {"prompt": f"{a} and {b} of {c}", "completion": f"{b} {a}"} for a in NUMBERS for b in NUMBERS for c in "xy"
    ]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    module = [sys.executable, "-m", "tests.integration.recipe_kill_worker"]
    command = [*module, str(base), str(rows), str(tmp_path), str(kills), "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == kills
    assert 0 < found["reference"]["best"] < 10, "an older checkpoint than the last is the best"
    assert all(end == found["reference"] for end in found["ends"])
