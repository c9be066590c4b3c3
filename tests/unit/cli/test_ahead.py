"""smolora plan: the result on stdout, the words on stderr, and 5 where a run doesn't fit."""

from __future__ import annotations

import json
import time

import smolora.recipes.plan as recipe
from smolora.recipes.plan_trial import try_out

FIELDS = ("--prompt-field", "mr", "--completion-field", "ref")
SHORT = ("--max-steps", 4, "--batch-size", 4)


def test_plan_prints_one_object_on_stdout_and_a_few_lines_on_stderr(smolora, base, rows, tmp_path):
    arguments = ("--model", base, "--data", rows, *FIELDS, *SHORT, "-o", tmp_path / "run", "--json")
    code, out, err = smolora("plan", *arguments)
    assert code == 0
    made = json.loads(out)
    assert (made["work"]["steps"], made["work"]["rows_per_step"], made["proposal"]) == (4, 4, None)
    assert made["memory"]["fits"] is True
    assert made["seconds"]["total"] > made["seconds"]["steps"] > 0
    assert [line.partition(":")[0] for line in err.splitlines()] == ["rows", "steps", "speed", "time", "memory"]
    assert not (tmp_path / "run").exists()


def test_a_run_that_does_not_fit_is_5_and_still_an_object(smolora, base, rows, tmp_path, monkeypatch):
    def try_here(config, **_):
        """Try it in this process, with 1 MiB; that one of its own does the same has tests of its own."""
        asked = recipe.TrialRequest(config.model_dump(mode="json"), time.time(), available=1 << 20)
        return try_out(asked, tmp_path / "trial")

    monkeypatch.setattr(recipe, "run_trial", try_here)
    monkeypatch.setattr(recipe, "propose", lambda *_: None)  # Which has tests of its own, and takes minutes.
    code, out, err = smolora("plan", "--model", base, "--data", rows, *FIELDS, *SHORT, "--json")
    assert code == 5
    assert json.loads(out)["memory"]["fits"] is False
    assert "error: the run doesn't fit in memory" in err


def test_plan_takes_what_train_takes_and_refuses_what_it_refuses(smolora, base):
    assert smolora("plan", "--model", base, "--batch-size", 3, "training.gradient_accumulation_steps=2")[0] == 2
    code, _, err = smolora("plan", "--learning-rate=1e-3")
    assert code == 2
    assert "Did you mean --lr?" in err
