"""The real pretrained model on real restaurant data: it learns, it answers, it merges."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from smolora.adapters.store import load_bundle
from smolora.config import ExperimentConfig, resolve_config
from smolora.generation.sampling import SamplingSettings
from smolora.generation.text_generator import TextGenerator
from smolora.recipes.finetune import finetune
from smolora.recipes.merge import merge

SHARED = Path(os.environ.get("SMOLORA_SHARED", Path(__file__).parents[2].parent / "shared"))
MODEL, ROWS = SHARED / "models" / "stories260K", SHARED / "data" / "e2e" / "devset.csv"
MEANING = "name[The Eagle], eatType[coffee shop], food[Japanese], priceRange[less than £20], area[riverside]"

pytestmark = pytest.mark.skipif(not ROWS.is_file(), reason=f"no E2E data at {SHARED} (set SMOLORA_SHARED)")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    settings = [
        f"model.name_or_path={MODEL}",
        "model.dtype=float32",
        f"data.sources={ROWS}",
        "data.prompt_field=MR",  # The file says mr: case doesn't matter.
        "data.completion_field=ref",
        "data.max_validation_rows=64",
        "training.learning_rate=1e-2",
        "training.max_steps=30",
        "training.eval_steps=30",
    ]
    return finetune(resolve_config(ExperimentConfig, assignments=settings), tmp_path_factory.mktemp("e2e") / "run")


def test_the_held_out_loss_falls_far_below_the_base(run):
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert lines[0]["eval_loss"] > 3.5
    assert lines[-1]["eval_loss"] < 1.9


def test_every_row_of_the_file_is_accounted_for(run):
    report = json.loads(run.data_report.read_text())
    assert report["read"] == 4672
    assert report["train"] + report["held_out"] + report["duplicate"] == 4672


def test_the_answer_is_restaurant_text_where_the_base_tells_a_story(run):
    greedy = SamplingSettings(max_new_tokens=40, temperature=0.0)
    before = TextGenerator(load_bundle(MODEL)).generate(MEANING, settings=greedy)[0]
    after = TextGenerator(load_bundle(run.path)).generate(MEANING, settings=greedy)[0]
    assert "coffee shop" not in before
    assert "coffee shop" in after


def test_the_merged_model_gives_the_adapters_logits(run, tmp_path):
    merge(run.path, tmp_path / "merged")
    ids = torch.tensor([[1, 403, 407, 261, 378]])
    with torch.no_grad():
        merged = load_bundle(tmp_path / "merged").model(input_ids=ids).logits
        adapted = load_bundle(run.path).model(input_ids=ids).logits
    # Logits reach 20, where a float32 rounds at 2e-6: 1e-5 of the largest is what the merge itself promises.
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-5 * adapted.abs().max().item())
