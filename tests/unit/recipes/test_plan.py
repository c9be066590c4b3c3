"""A plan counts what a run will do, measures it outside of the run's folder, and proposes what fits."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial

import psutil
import pytest

from smolora.config import ExperimentConfig, resolve_config
from smolora.errors import ConfigError, DataError, StorageError
from smolora.recipes.estimate import Estimate, Memory, Parts, Seconds, Work
from smolora.recipes.finetune import finetune
from smolora.recipes.plan import Plan, Proposal, TrialRequest, apply_settings, plan, propose, run_trial
from smolora.recipes.plan_trial import try_out
from smolora.runtime import signals
from tests.tiny import save_tiny_model

NUMBERS = ["one", "two", "three", "four", "five", "six"]
WORK = Work(100, 10, 5000, 2000, 50, 16, 4000, 60, 110)
SECONDS = Seconds(preparation=4.0, steps=10.0, evaluations=3.0, checkpoints=2.0, verdict=5.0, ending=1.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model("llama", tmp_path_factory.mktemp("plan") / "base")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("plan-data") / "rows.jsonl"
    pairs = [(f"{a} and {b} of {c}", f"{b} {a}") for a in NUMBERS for b in NUMBERS for c in NUMBERS[:2]]
    file.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    return file


def config(base, rows, *assignments):
    settings = [f"model.name_or_path={base}", f"data.sources={rows}", "model.dtype=float32", "training.max_steps=12"]
    return resolve_config(ExperimentConfig, assignments=[*settings, *assignments])


def read_tokens(run):
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return sum(line["input_tokens"] for line in lines if "loss" in line)


def test_a_plan_counts_what_the_run_then_does_and_says_what_it_measures_and_leaves_nothing(
    tmp_path, base, rows, monkeypatch, caplog, capfd
):
    caplog.set_level("INFO", "smolora")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    (here / "datasets.py").write_text("raise ImportError('a file in the current folder, not the library')")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "temporary").mkdir()
    asked = config(base, rows, "training.logging_steps=1", "training.gradient_accumulation_steps=2")
    estimate = plan(asked, tmp_path / "run").estimate
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith("measuring whole steps, of about ")
    assert said.err.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert [path.name for path in here.iterdir()] == ["datasets.py"]
    assert list((tmp_path / "temporary").iterdir()) == []
    run = finetune(asked, tmp_path / "run")
    assert (estimate.work.steps, estimate.work.input_tokens) == (12, read_tokens(run))
    assert (estimate.work.rows, estimate.work.held_out_rows, estimate.work.rows_per_step) == (69, 3, 16)
    assert 0 < estimate.memory.typical_peak <= estimate.memory.peak < estimate.memory.available
    assert min(vars(estimate.seconds).values()) > 0


@pytest.mark.slow
def test_a_resumed_run_is_planned_from_its_checkpoint(tmp_path, base, rows):
    run = finetune(config(base, rows, "training.max_steps=4"), tmp_path / "run")
    before = sorted(path.name for path in run.path.iterdir())
    assert plan(config(base, rows), run.path, resume=True).estimate.work.steps == 8
    assert sorted(path.name for path in run.path.iterdir()) == before
    with pytest.raises(ConfigError, match="has done all of its 4 steps"):
        plan(config(base, rows, "training.max_steps=4"), run.path, resume=True)


@pytest.mark.slow
def test_phases_and_profiles_of_the_run_do_not_stop_its_trial(base, rows):
    asked = config(base, rows, "phases.strategy=early,late", "training.profile_steps=[1,2]", "training.max_steps=6")
    assert run_trial(asked).seconds is not None


def test_what_would_stop_the_run_stops_its_plan_with_the_same_error(base, rows):
    with pytest.raises(DataError, match="but the longest allowed is 4"):
        plan(config(base, rows, "data.max_length=4"))


@pytest.mark.parametrize(
    "numbers", [[signal.SIGTERM], [signal.SIGTERM, signal.SIGINT]], ids=["one", "an impatient second one"]
)
def test_a_signal_ends_the_trial_and_leaves_nothing(tmp_path, base, rows, monkeypatch, numbers):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(signals, "_SAME_WISH", 0.0)
    is_over, children = threading.Event(), psutil.Process().children()

    def stop_it():
        while not is_over.wait(0.01):
            if list(tmp_path.glob("*/run")):  # The trial is under way.
                for number in numbers:  # Of one kind, those that wait would be one.
                    os.kill(os.getpid(), number)
                return

    thread = threading.Thread(target=stop_it)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_trial(config(base, rows))
    finally:
        is_over.set()
        thread.join()
    assert list(tmp_path.iterdir()) == []
    assert psutil.Process().children() == children


@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="pip install 'smolora[tensorboard]'")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trial_sends_nothing_to_the_trackers_of_the_run(base, rows, tmp_path):
    asked = config(base, rows, "training.report_to=tensorboard").model_dump(mode="json")
    assert try_out(TrialRequest(asked, time.time()), tmp_path / "run").seconds is not None
    assert not (tmp_path / "run" / "trackers").exists()


@pytest.mark.skipif(bool(importlib.util.find_spec("wandb")), reason="wandb is installed")
def test_a_tracker_that_is_not_installed_stops_the_trial_as_it_stops_the_run(base, rows, tmp_path):
    asked = config(base, rows, "training.report_to=wandb").model_dump(mode="json")
    with pytest.raises(ConfigError, match="wandb isn't installed"):
        try_out(TrialRequest(asked, time.time()), tmp_path / "run")


def test_what_is_expected_not_to_fit_is_not_tried(base, rows, tmp_path):
    asked = config(base, rows).model_dump(mode="json")
    estimate = try_out(TrialRequest(asked, time.time(), available=1 << 20), tmp_path / "run")
    assert estimate.memory.peak > 1 << 20
    assert estimate.seconds is None
    assert (estimate.parts.tokens, estimate.parts.bytes_per_token) == (0, 0)
    assert "measured" not in estimate.describe()
    with pytest.raises(StorageError, match=r"doesn't fit in memory: .* 1 MiB are there. Nothing that was tried does"):
        Plan(estimate).require_fit()


def test_a_step_that_takes_longer_than_there_is_patience_is_planned_from_parts_of_it(base, rows, tmp_path):
    asked = config(base, rows, "training.per_device_train_batch_size=40", "training.gradient_accumulation_steps=1000")
    request = TrialRequest(asked.model_dump(mode="json"), time.time(), patience=0.0)
    estimate = try_out(request, tmp_path / "run")
    assert estimate.parts.tokens >= estimate.parts.pass_tokens / 4
    assert estimate.memory.typical_peak is None
    assert estimate.memory.fits
    assert min(vars(estimate.seconds).values()) > 0
    assert f"measured: parts of a step, of up to {estimate.parts.tokens:,} tokens" in estimate.describe()


def test_a_proposal_is_applied_by_path_and_keeps_the_rest(base, rows):
    asked = config(base, rows, "adapter.r=3", "training.seed=5")
    settings = {"training.gradient_checkpointing": True, "data.max_length": 32, "speed.packed_weights": False}
    changed = apply_settings(asked, settings)
    assert (changed.training.gradient_checkpointing, changed.data.max_length, changed.speed.packed_weights) == (
        True,
        32,
        False,
    )
    assert (changed.adapter, changed.training.seed, changed.data.sources) == (asked.adapter, 5, asked.data.sources)


def test_an_estimate_survives_json_and_adds_up():
    estimate = Estimate(Memory(4 << 30, 3 << 30, 2 << 30), WORK, SECONDS, Parts(60, 110, 2.5))
    assert Estimate.from_dict(json.loads(json.dumps(estimate, default=vars))) == estimate
    printed = estimate.to_dict()
    assert (printed["seconds"]["total"], printed["seconds"]["per_step"]) == (25.0, 0.2)
    assert (printed["work"]["tokens_per_step"], printed["tokens_per_second"]) == (80.0, 400.0)
    assert printed["memory"]["fits"] is True
    assert printed["parts"] == {"tokens": 60, "pass_tokens": 110, "bytes_per_token": 2.5}


@pytest.mark.parametrize(
    ("memory", "fits"),
    [(Memory(10, 10), True), (Memory(10, 11), False), (Memory(None, 11), True), (Memory(10, None), False)],
)
def test_a_run_fits_where_its_peak_is_known_and_no_more_than_there_is(memory, fits):
    assert memory.fits is fits


def test_a_refusal_names_the_words_to_add_and_what_they_lead_to():
    settings = {
        "training.per_device_train_batch_size": 2,
        "training.gradient_accumulation_steps": 8,
        "training.gradient_checkpointing": True,
    }
    proposal = Proposal(settings, Estimate(Memory(2 << 30, 1 << 30, 1 << 29), WORK, SECONDS))
    with pytest.raises(StorageError) as caught:
        Plan(Estimate(Memory(2 << 30, 3 << 30), WORK), proposal).require_fit()
    said = str(caught.value)
    assert "3,072 MiB in the largest; 2,048 MiB are there" in said
    words = "--batch-size 16 training.gradient_accumulation_steps=8 training.gradient_checkpointing=true\n"
    assert words in said
    assert "time: 0:25" in said
    assert "verdict 0:05, report 0:01" in said


def pretend(config, *, available, tried):
    """Estimate by a formula, for what would otherwise take minutes: bytes for weights, and for each row of a pass."""
    tried.append(config)
    row = min(60, config.data.max_length or 60)
    trained = config.training.per_device_train_batch_size * row * (1 if config.training.gradient_checkpointing else 2)
    peak = max(trained, config.evaluation.batch_size * row * 5 // 6) + (300 if config.speed.packed_weights else 100)
    return Estimate(Memory(available, peak), WORK)


@pytest.mark.parametrize(
    ("available", "settings"),
    [
        (700, {"training.per_device_train_batch_size": 2, "training.gradient_accumulation_steps": 8}),
        (
            600,
            {
                "training.per_device_train_batch_size": 2,
                "training.gradient_accumulation_steps": 8,
                "evaluation.batch_size": 1,
            },
        ),
        (
            400,
            {
                "training.per_device_train_batch_size": 1,
                "training.gradient_accumulation_steps": 16,
                "evaluation.batch_size": 1,
                "training.gradient_checkpointing": True,
            },
        ),
        (
            250,
            {
                "training.per_device_train_batch_size": 2,
                "training.gradient_accumulation_steps": 8,
                "evaluation.batch_size": 1,
                "training.gradient_checkpointing": True,
                "speed.packed_weights": False,
            },
        ),
        (
            135,
            {
                "training.per_device_train_batch_size": 1,
                "training.gradient_accumulation_steps": 16,
                "evaluation.batch_size": 1,
                "training.gradient_checkpointing": True,
                "speed.packed_weights": False,
                "data.max_length": 32,
                "data.overlong": "truncate",
            },
        ),
    ],
)
def test_the_change_that_costs_least_is_proposed_and_keeps_the_rows_of_an_update(base, rows, available, settings):
    asked = config(base, rows, "training.gradient_accumulation_steps=2")
    tried = []
    estimate = pretend(asked, available=available, tried=tried)
    estimate = Estimate(estimate.memory, Work(**{**vars(WORK), "longest_row": 64}))
    proposal = propose(asked, estimate, lambda changed: pretend(changed, available=available, tried=tried))
    assert proposal.settings == settings
    assert proposal.estimate.memory.fits
    assert {changed.training.rows_per_step for changed in tried} == {16}


def test_a_change_that_the_method_can_not_have_is_left_out_of_what_is_proposed(base, rows):
    asked = config(base, rows, "adapter.method=prefix_tuning", "training.gradient_accumulation_steps=2")
    outgrown = Estimate(Memory(250, None), WORK)
    proposal = propose(asked, outgrown, lambda changed: pretend(changed, available=250, tried=[]))
    assert proposal.settings == {
        "training.per_device_train_batch_size": 1,
        "training.gradient_accumulation_steps": 16,
        "evaluation.batch_size": 1,
        "speed.packed_weights": False,
    }


def test_a_budget_of_tokens_is_divided_and_never_below_the_longest_row(base, rows):
    asked = config(base, rows, "speed.max_tokens_per_batch=256")
    tried = []

    def estimate(changed):
        budget = changed.speed.max_tokens_per_batch
        tried.append(budget)
        if budget < 60:
            raise ConfigError("a row has 60 tokens")
        return Estimate(Memory(300, 240 + budget - (0 if changed.speed.packed_weights else 50)))

    proposal = propose(asked, Estimate(Memory(300, None)), estimate)
    assert proposal.settings == {
        "speed.max_tokens_per_batch": 64,
        "training.gradient_accumulation_steps": 4,
        "evaluation.batch_size": 1,
        "training.gradient_checkpointing": True,
        "speed.packed_weights": False,
    }
    assert proposal.describe().startswith("speed.max_tokens_per_batch=64 training.gradient_accumulation_steps=4 ")


HUGE = Work(4000, 0, 600_000, 300_000, 1, 4000, 600_000, 300, 600_000)
"""Of one step of 4,000 rows of 150 tokens; one has 300."""


def pretend_by_parts(config, *, available, tried, weights=1000):
    """Estimate what is too large to be run: bytes for weights, and for each token of a pass."""
    budget = config.speed.max_tokens_per_batch
    tried.append(budget or config.training.per_device_train_batch_size)
    held = min(budget or 150 * tried[-1], 600_000)
    return Estimate(Memory(available, weights + 2 * held), HUGE, parts=Parts(40_000, held, 2.0))


@pytest.mark.parametrize(
    ("available", "rows_of_a_pass"),
    [(1_000_000, 2500), (10_000, 20), (2300, 1)],
)
def test_the_parts_of_a_huge_pass_say_which_one_fits_and_no_other_is_tried(base, rows, available, rows_of_a_pass):
    asked = config(base, rows, "training.per_device_train_batch_size=40000")
    tried = []
    estimate = pretend_by_parts(asked, available=available, tried=tried)
    proposal = propose(asked, estimate, partial(pretend_by_parts, available=available, tried=tried))
    assert proposal.settings == {
        "training.per_device_train_batch_size": rows_of_a_pass,
        "training.gradient_accumulation_steps": 40_000 // rows_of_a_pass,
    }
    assert tried == [40_000, rows_of_a_pass]


def test_a_pass_that_takes_more_than_its_line_gives_way_to_a_smaller_one(base, rows, caplog):
    caplog.set_level("INFO")
    asked = config(base, rows, "training.per_device_train_batch_size=40000")
    tried = []
    estimate = pretend_by_parts(asked, available=10_000, tried=tried)
    heavier = partial(pretend_by_parts, available=10_000, tried=tried, weights=5000)
    proposal = propose(asked, estimate, heavier)
    assert tried == [40_000, 20, 8]
    assert proposal.settings["training.per_device_train_batch_size"] == 8
    assert "it doesn't fit; trying --batch-size 40000 training.gradient_accumulation_steps=5000" in caplog.text


def test_no_smaller_pass_is_tried_where_the_evaluation_before_the_first_step_takes_too_much(base, rows):
    asked = config(base, rows, "training.gradient_checkpointing=true", "speed.packed_weights=false")
    tried = []

    def estimate(changed):
        tried.append(
            (changed.evaluation.batch_size, changed.training.per_device_train_batch_size, changed.data.max_length)
        )
        return Estimate(Memory(800, 900), Work(**{**vars(WORK), "longest_row": 64}), parts=Parts(0, 500, 0.0))

    assert propose(asked, estimate(asked), estimate) is None
    assert tried == [(8, 8, None), (1, 8, None), (1, 8, 32)]


def test_where_a_change_makes_the_whole_pass_fit_no_smaller_one_is_tried(base, rows):
    tried = []

    def estimate(changed):
        tried.append((changed.training.per_device_train_batch_size, changed.training.gradient_checkpointing))
        return Estimate(Memory(800, 700 if changed.training.gradient_checkpointing else 900), WORK)

    asked = config(base, rows)
    assert propose(asked, estimate(asked), estimate).settings["training.gradient_checkpointing"] is True
    assert [size for size, is_checkpointed in tried if is_checkpointed] == [8]


def test_no_budget_of_tokens_below_a_row_is_tried(base, rows):
    asked = config(base, rows, "speed.max_tokens_per_batch=600000")
    tried = []
    estimate = pretend_by_parts(asked, available=1840, tried=tried)
    proposal = propose(asked, estimate, partial(pretend_by_parts, available=1840, tried=tried))
    assert proposal.settings["speed.max_tokens_per_batch"] == 300
    assert tried == [600_000, 300]


def test_where_a_trial_ran_out_of_memory_unknown_what_lives_through_its_own_is_proposed(base, rows):
    def estimate(changed):
        peaks = {8: None, 4: 900, 2: 500, 1: 400}  # A smaller pass gets to where it can look.
        return Estimate(Memory(600, peaks[changed.training.per_device_train_batch_size]), WORK)

    proposal = propose(config(base, rows), Estimate(Memory(None, None)), estimate)
    assert proposal.settings == {
        "training.per_device_train_batch_size": 2,
        "training.gradient_accumulation_steps": 4,
    }


def test_evaluation_stays_as_it_is_where_nothing_is_held_out(base, rows):
    def estimate(changed):
        return Estimate(Memory(500, 400 if changed.training.gradient_checkpointing else 900))

    outgrown = Estimate(Memory(500, 900), Work(**{**vars(WORK), "held_out_rows": 0}))
    proposal = propose(config(base, rows), outgrown, estimate)
    assert proposal.settings["training.gradient_checkpointing"] is True
    assert "evaluation.batch_size" not in proposal.settings


SEARCH = """
import sys
from smolora.config import ExperimentConfig
from smolora.recipes.estimate import Estimate, Memory
from smolora.recipes.plan import propose

asked = ExperimentConfig(model={"name_or_path": "base"}, data={"sources": ("rows.jsonl",)})
propose(asked, Estimate(Memory(500, 900)), lambda changed: Estimate(Memory(500, 900)))
print("torch" in sys.modules)
"""


def test_a_search_loads_no_torch_since_the_run_has_that_memory():
    assert (
        subprocess.run([sys.executable, "-c", SEARCH], capture_output=True, text=True, check=True).stdout == "False\n"
    )


def test_nothing_is_proposed_where_nothing_fits_or_nothing_is_left_to_learn(base, rows):
    asked = config(base, rows)
    outgrown = Estimate(Memory(50, None), Work(**{**vars(WORK), "longest_row": 64}))
    assert propose(asked, outgrown, lambda changed: pretend(changed, available=50, tried=[])) is None

    def cut_to_nothing(changed):
        if changed.data.max_length:
            raise DataError("none of the rows is left with a token to learn")
        return outgrown

    assert propose(asked, outgrown, cut_to_nothing) is None
