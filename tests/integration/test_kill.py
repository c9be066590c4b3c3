"""A run that is killed at random moments and resumed each time ends with the bits of a run that never stopped."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.tiny import save_tiny_model


@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_random_kills_lose_nothing_and_change_no_bit(tmp_path, kills):
    base = save_tiny_model("llama", tmp_path / "base")
    command = [sys.executable, "-m", "tests.integration.kill_worker", str(base), str(tmp_path), str(kills), "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == kills
    assert all(end == found["reference"] for end in found["ends"])
    assert found["leftovers"] == []
