"""What a comparison finds where the truth is known, what it refuses, and what it keeps."""

from __future__ import annotations

import json
import shutil

import pytest

from smolora.config import AdaLoRAConfig, ExperimentConfig, resolve_config
from smolora.errors import ConfigError, DataError
from smolora.recipes.compare import compare, describe_comparison
from smolora.records.study_dir import ComparisonDir
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model("llama", tmp_path_factory.mktemp("compare") / "base")


@pytest.fixture(scope="module")
def three(base, tmp_path_factory):
    """Three configurations, a folder where they are compared over three seeds, and what was found."""
    folder = tmp_path_factory.mktemp("three")
    plain = config(base, write_rows(folder / "rows.jsonl"))
    slow = plain.replace(training=plain.training.replace(learning_rate=1e-6))
    configs = {"plain": plain, "twin": plain, "idle": slow}
    return configs, folder / "out", compare(configs, folder / "out", num_seeds=3, workers=2)


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl")


def write_rows(file, letters="klmnopqr"):
    pairs = [(f"the {a} of {b}", f"{b} {a}") for a in "abcdefgh" for b in letters]
    file.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    return file


def config(base, rows, *assignments):
    settings = [f"model.name_or_path={base}", f"data.sources={rows}", "model.dtype=float32", "adapter.r=2"]
    steps = ["training.max_steps=6", "training.learning_rate=1e-2", "evaluation.verdict_share=0"]
    return resolve_config(ExperimentConfig, assignments=[*settings, *steps, *assignments])


def test_twins_show_no_difference_a_rate_near_0_is_worse_and_what_is_finished_is_kept(three):
    configs, out, found = three
    plain, twin, idle = found.standings
    assert twin.against_first.differences == (0.0, 0.0, 0.0)
    assert twin.against_first.verdict == "no difference"
    assert idle.against_first.verdict == "worse"
    assert len(set(plain.losses)) == 3, "seeds differ"
    assert max(idle.losses) - min(idle.losses) < 1e-3, "the held-out rows are the same for all seeds"
    folder = ComparisonDir(out)
    written = json.loads(folder.result.read_text())
    assert [standing["name"] for standing in written["standings"]] == ["plain", "twin", "idle"]
    assert written["confidence_of_each"] == pytest.approx(0.975)
    assert folder.plot.read_bytes().startswith(b"\x89PNG")
    assert "no difference" in describe_comparison(found)
    times = {file: file.stat().st_mtime_ns for file in out.rglob("seed-*/**/*")}
    assert compare(configs, out, num_seeds=3, workers=2) == found
    assert {file: file.stat().st_mtime_ns for file in out.rglob("seed-*/**/*")} == times


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.max_steps=7", "training.max_steps is 6 and 7"),
        ("training.gradient_accumulation_steps=2", "rows per step is 8 and 16"),
        ("training.eval_steps=2", "training.eval_steps is None and 2"),
        ("data.max_length=30", "data.max_length is None and 30"),
        ("speed.max_tokens_per_batch=99", "speed.max_tokens_per_batch is None and 99"),
        ("speed.group_by_length=true", "speed.group_by_length is False and True"),
        ("evaluation.early_stopping_patience=1", "a run that stops early computes less"),
    ],
)
def test_unequal_work_is_refused_by_name(base, rows, tmp_path, setting, message):
    with pytest.raises(ConfigError, match=message):
        compare({"a": config(base, rows), "b": config(base, rows, setting)}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_of_a_token_budget_the_passes_of_an_update_are_equal_work(base, rows, tmp_path):
    budget, eight, four = (
        "speed.max_tokens_per_batch=99",
        "per_device_train_batch_size=8",
        "per_device_train_batch_size=4",
    )
    twice = "training.gradient_accumulation_steps=2"
    with pytest.raises(ConfigError, match="gradient_accumulation_steps is 2 and 4"):
        other = config(base, rows, budget, f"training.{four}", "training.gradient_accumulation_steps=4")
        compare({"a": config(base, rows, budget, f"training.{eight}", twice), "b": other}, tmp_path / "out")
    same = {size: config(base, rows, budget, f"training.{size}", twice) for size in (eight, four)}
    one, other = compare(same, tmp_path / "out", num_seeds=2).standings
    assert one.losses == other.losses


@pytest.mark.slow
def test_the_same_rows_a_step_in_two_passes_are_equal_work(base, rows, tmp_path):
    halves = ("training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=2")
    configs = {"one": config(base, rows), "two": config(base, rows, *halves)}
    found = compare(configs, tmp_path / "out", num_seeds=2)
    # Two passes add up in another order, and dropout draws in another shape.
    assert found.standings[1].losses == pytest.approx(found.standings[0].losses, abs=0.1)


def test_a_loss_of_ranks_that_adalora_took_away_later_does_not_count(base, rows, tmp_path):
    others = tmp_path / "others.jsonl"  # Nobody learns what these say, so their loss is lowest early.
    others.write_text("".join(json.dumps({"prompt": a, "completion": "zebra"}) + "\n" for a in "abcdef"))
    settings = ("training.eval_steps=1", "training.learning_rate=5e-1", "evaluation.verdict_share=0")
    spreading = config(base, rows, f"data.eval_source={others}", *settings)
    spreading = spreading.replace(adapter=AdaLoRAConfig(init_r=4, target_r=2, tinit=2, tfinal=1))
    compare({"a": spreading, "b": spreading}, tmp_path / "out", num_seeds=2)
    folder = ComparisonDir(tmp_path / "out")
    lines = (folder.run("a", 0) / "metrics.jsonl").read_text().splitlines()
    losses = {line["step"]: line["eval_loss"] for line in map(json.loads, lines) if line["step"]}
    outcome = json.loads(folder.outcome("a", 0).read_text())
    assert min(losses, key=losses.get) < 5 <= outcome["step"]
    assert outcome["lowest"] == losses[outcome["step"]]


def test_runs_of_other_settings_are_refused(three, tmp_path):
    configs, out, _ = three
    changed = {**configs, "twin": configs["idle"]}
    with pytest.raises(ConfigError, match=r"twin/seed-0 was started with other settings: training.learning_rate was 0"):
        compare(changed, out, num_seeds=3)
    shutil.copytree(out, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/idle/seed-2")
    rows = out.parent / "rows.jsonl"
    before = rows.read_bytes()
    write_rows(rows, letters="stuvwxyz")
    with pytest.raises(DataError, match="idle, seed 2, was run on another data than plain, seed 0"):
        compare(configs, tmp_path / "out", num_seeds=3)
    rows.write_bytes(before)


def test_a_comparison_needs_two_configurations_two_seeds_and_a_worker(base, rows, tmp_path):
    two = {"a": config(base, rows), "b": config(base, rows)}
    with pytest.raises(ConfigError, match="two configurations at least, found 1"):
        compare({"a": two["a"]}, tmp_path)
    with pytest.raises(ConfigError, match="2 seeds at least, found 1"):
        compare(two, tmp_path, num_seeds=1)
    with pytest.raises(ConfigError, match="--workers: at least 1, found 0"):
        compare(two, tmp_path, workers=0)


def test_without_held_out_rows_there_is_nothing_to_compare_by(base, rows, tmp_path):
    bare = config(base, rows, "data.validation_fraction=0")
    with pytest.raises(DataError, match="nothing is held out"):
        compare({"a": bare, "b": bare}, tmp_path / "out")
