"""A classifier answers by its head, wherever it is asked; what would have it write says what it is."""

from __future__ import annotations

import json

import pytest
import torch

from smolora.adapters.store import load_adapter
from smolora.config import DataConfig, EvaluationConfig, ExperimentConfig, LoRAConfig, ModelConfig, TrainingConfig
from smolora.errors import ConfigError
from smolora.generation.sampling import SamplingSettings
from smolora.inference.pipeline import InferencePipeline
from smolora.models.loading import load_model
from smolora.recipes.finetune import finetune
from smolora.recipes.generate import generate
from smolora.recipes.merge import merge
from tests.tiny import random_input_ids, save_tiny_encoder, save_tiny_model

WORDS = ("good", "fine", "bad", "poor")


def train(folder, rows):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = ExperimentConfig(
        model=ModelConfig(name_or_path=str(save_tiny_encoder("bert", folder / "base")), task_type="classification"),
        data=DataConfig(sources=(str(file),)),
        adapter=LoRAConfig(r=2),
        training=TrainingConfig(max_steps=30, learning_rate=1e-2),
        evaluation=EvaluationConfig(verdict_share=0),
    )
    return finetune(config, folder / "run").path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    rows = [{"text": f"the {WORDS[i % 4]} dog {i}", "label": "yes" if i % 4 < 2 else "no"} for i in range(60)]
    return train(tmp_path_factory.mktemp("texts"), rows)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    rows = [{"premise": f"a {i}", "hypothesis": WORDS[i % 4], "label": ("yes", "no")[i % 2]} for i in range(60)]
    return train(tmp_path_factory.mktemp("pairs"), rows)


def test_the_head_answers_with_probabilities(run):
    pipeline = InferencePipeline.from_path(run, device="cpu")
    good, bad = pipeline.classify(["the good dog 1", "the poor dog 3"])
    assert (good.label, bad.label) == ("yes", "no")
    assert sum(good.shares.values()) == pytest.approx(1) and good.shares["yes"] > 0.5
    assert pipeline.classify("the good dog 1").label == "yes"


def test_a_long_text_without_a_mask_is_read_to_its_end_in_16_bits(tmp_path):
    folder = save_tiny_model("llama", tmp_path, max_position_embeddings=1024)
    model = load_model(folder, task="classification", labels=("no", "yes"), dtype=torch.bfloat16).model
    input_ids = random_input_ids(600)
    expected = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits
    assert torch.equal(model(input_ids=input_ids).logits, expected)


@pytest.mark.parametrize(
    ("family", "save"), [("bert", save_tiny_encoder), ("xlnet", save_tiny_encoder), ("gpt2", save_tiny_model)]
)
def test_a_text_has_the_chances_that_it_has_alone_beside_a_longer_one(family, save, tmp_path):
    pipeline = InferencePipeline(
        load_model(save(family, tmp_path / "base"), task="classification", labels=("no", "yes"))
    )
    alone = pipeline.classify("the dog").shares
    assert pipeline.classify(["the dog", "the good dog sat on the log"])[0].shares == pytest.approx(alone, abs=1e-6)


def test_a_merged_classifier_answers_the_same(run):
    before = InferencePipeline.from_path(run, device="cpu").classify("the good dog 1").shares
    merge(run)
    after = InferencePipeline.from_path(run / "final_merged", device="cpu").classify("the good dog 1").shares
    assert after == pytest.approx(before, abs=1e-5)


def test_without_its_adapter_the_head_is_the_fresh_one(run):
    pipeline = InferencePipeline.from_path(run, device="cpu")
    fresh = InferencePipeline(load_model(run.parent / "base", task="classification", labels=("no", "yes")))
    assert pipeline.classify("the bad dog 2", adapter="base") == fresh.classify("the bad dog 2")
    assert pipeline.classify("the bad dog 2") != fresh.classify("the bad dog 2")


def test_an_adapter_and_its_base_each_name_their_own_labels(run):
    base = load_model(run.parent / "base", task="classification", labels=("neg", "pos"))
    fresh = InferencePipeline(base).classify("the bad dog 2")
    pipeline = InferencePipeline(load_adapter(base, run / "adapter_checkpoint"))
    assert pipeline.classify("the bad dog 2").shares.keys() == {"no", "yes"}
    assert pipeline.classify("the bad dog 2", adapter="base") == fresh


def test_several_classifiers_open_on_one_base_by_their_folders(run, pairs):
    pipeline = InferencePipeline.from_path(run.parent / "base", adapters={"texts": run, "pairs": pairs}, device="cpu")
    for path, adapter, second in ((run, "texts", None), (pairs, "pairs", "good")):
        alone = InferencePipeline.from_path(path, device="cpu").classify("a good dog 1", text_pairs=second)
        found = pipeline.classify("a good dog 1", text_pairs=second, adapter=adapter)
        assert (found.label, found.shares) == (alone.label, pytest.approx(alone.shares, abs=1e-5))
    with pytest.raises(ConfigError, match="leave base= out"):
        InferencePipeline.from_path(run.parent / "base", base=run.parent / "base", adapters={"texts": run})


def test_generate_gives_the_label(run):
    assert generate(str(run), "the good dog 1") == "yes"
    with pytest.raises(ConfigError, match="--temperature would change nothing"):
        generate(str(run), "the good dog 1", SamplingSettings(temperature=0.5))


def test_two_texts_are_classified_together(pairs):
    pipeline = InferencePipeline.from_path(pairs, device="cpu")
    assert len(pipeline.classify(["a 1", "a 2"], text_pairs=["good", "fine"])) == 2
    with pytest.raises(ConfigError, match="trained on 2 texts a row, and what is asked has 1"):
        pipeline.classify("a 1")
    with pytest.raises(ConfigError, match="2 texts and 1 second texts"):
        pipeline.classify(["a 1", "a 2"], text_pairs=["good"])


def test_what_a_classifier_has_no_use_for_is_refused(run):
    pipeline = InferencePipeline.from_path(run, device="cpu")
    with pytest.raises(ConfigError, match="labels are no, yes"):
        pipeline.classify("a", ["up", "down"])
    with pytest.raises(ConfigError, match="not conversations"):
        pipeline.classify([[{"role": "user", "content": "a"}]])


@pytest.mark.parametrize("ask", ["generate", "chat", "stream", "start_conversation"])
def test_what_would_have_it_write_says_what_it_is(run, ask):
    pipeline = InferencePipeline.from_path(run, device="cpu")
    given = {"generate": ("a",), "stream": ("a",), "chat": ([{"role": "user", "content": "a"}],)}.get(ask, ())
    with pytest.raises(ConfigError, match=r"a text classifier \(no, yes\) and writes no text"):
        list(getattr(pipeline, ask)(*given))


def test_a_model_that_writes_reads_no_second_text(tmp_path):
    pipeline = InferencePipeline.from_path(save_tiny_model("llama", tmp_path / "base"), device="cpu")
    with pytest.raises(ConfigError, match="text_pairs are for a classifier"):
        pipeline.classify("a", ["yes", "no"], text_pairs="b")
