"""A model by its path on a benchmark by its name."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from smolora.adapters.attach import attach_adapter
from smolora.adapters.store import load_bundle, save_adapter
from smolora.config import LoRAConfig
from smolora.data.prompts import PromptFormat
from smolora.errors import ConfigError, ModelError
from smolora.evaluation.row_source import open_benchmark
from smolora.evaluation.tasks import (
    evaluate_benchmark,
    evaluate_e2e,
    evaluate_model,
    evaluate_multi_nli,
    fill_settings,
)
from smolora.generation.sampling import SamplingSettings
from smolora.records.run_dir import RunDir
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model("gpt2", tmp_path_factory.mktemp("tasks") / "base", n_positions=256)


@pytest.fixture
def nli(tmp_path):
    rows = [
        {"premise": f"cat {n}", "hypothesis": "the cat", "label": ("neutral", "entailment")[n % 2]} for n in range(6)
    ]
    folder = tmp_path / "nli"
    folder.mkdir()
    (folder / "multinli_1.0_dev_matched.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_e2e_is_scored_with_its_metrics(base, tmp_path):
    (tmp_path / "testset_w_refs.csv").write_text("mr,ref\nname[A],A cat sat.\nname[A],Cats sit.\nname[B],B.\n")
    result = evaluate_e2e(base, num_samples=2, batch_size=2, data_dir=tmp_path)
    assert result.num_rows == 2
    assert {"bleu", "nist", "rougeL", "meteor", "cider", "loss"} <= result.metrics.keys()
    assert result.scores["bleu"].variant.endswith("case lc, smoothing exp")
    assert result.folder is None


def test_labels_are_written_or_the_likeliest(base, nli):
    written = evaluate_multi_nli(base, data_dir=nli)
    likeliest = evaluate_multi_nli(base, data_dir=nli, by_likelihood=True)
    assert written.metrics["accuracy"] == 0.0  # A random model writes no label, and always prefers one.
    assert likeliest.metrics["loss"] == pytest.approx(written.metrics["loss"])
    assert likeliest.metrics["f1"] <= 0.5 + 1e-9


def test_an_adapter_goes_on_its_base_and_is_part_of_the_identity(base, nli, tmp_path):
    fmt = PromptFormat(kind="prompt_completion", columns={"prompt": "a", "completion": "b"})
    save_adapter(
        replace(attach_adapter(load_bundle(base), LoRAConfig(r=2), seed=0), prompt_format=fmt), tmp_path / "adapter"
    )
    out = tmp_path / "out"
    named = evaluate_multi_nli(tmp_path / "adapter", str(base), data_dir=nli, out=out)
    assert evaluate_multi_nli(tmp_path / "adapter", data_dir=nli).metrics == named.metrics
    assert json.loads((out / "evaluation.json").read_text())["identity"]["adapter"] is not None


def test_a_run_is_evaluated_on_a_base_that_is_named(base, nli, tmp_path):
    run = RunDir(tmp_path / "run")
    save_adapter(attach_adapter(load_bundle(base), LoRAConfig(r=2), seed=0), run.adapter)
    run.resolved_config.write_text("{}")
    result = evaluate_multi_nli(run.path, str(base), 2, data_dir=nli)
    assert result.metrics == evaluate_multi_nli(base, num_samples=2, data_dir=nli).metrics  # A fresh adapter is none.
    assert result.folder == run.path / "evaluation" / "multi_nli-test-first-2"


def copy_with(folder, out, name, **settings):
    """Copy a model, with other settings in one of its files."""
    shutil.copytree(folder, out)
    file = out / name
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.is_file() else {}), **settings}))
    return {"model_path": out}


def add_adapter(base, out):
    save_adapter(attach_adapter(load_bundle(base), LoRAConfig(r=2), seed=0), out)
    return {"model_path": out}


def change_rows(nli):
    file = nli / "multinli_1.0_dev_matched.jsonl"
    file.write_text(file.read_text().replace("cat", "dog"))
    return {}


CHANGES = {
    "nothing": lambda base, nli, out: {},
    "weights": lambda base, nli, out: {"model_path": save_tiny_model("gpt2", out, seed=1, n_positions=256)},
    "adapter": lambda base, nli, out: add_adapter(base, out),
    "tokenizer": lambda base, nli, out: copy_with(base, out, "tokenizer_config.json", chat_template="{{ messages }}"),
    "generation": lambda base, nli, out: copy_with(base, out, "generation_config.json", repetition_penalty=5.0),
    "settings": lambda base, nli, out: {"settings": SamplingSettings(max_new_tokens=3)},
    "beams": lambda base, nli, out: {"settings": SamplingSettings(num_beams=2)},
    "labels": lambda base, nli, out: {"by_likelihood": True},
    "file": lambda base, nli, out: change_rows(nli),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_answers_depend_on_has_them_asked_anew(base, nli, tmp_path, change):
    arguments = {"model_path": base, "data_dir": nli, "num_samples": 2, "out": tmp_path / "out"}
    evaluate_multi_nli(**arguments)
    predictions = tmp_path / "out" / "predictions.jsonl"
    predictions.write_text(predictions.read_text().replace('"prediction": "', '"prediction": "kept '))
    evaluate_multi_nli(**{**arguments, **CHANGES[change](base, nli, tmp_path / "other")})
    assert ("kept " in predictions.read_text()) == (change == "nothing")


@pytest.mark.parametrize(("seed", "is_kept"), [({"seed": 1}, True), ({}, False)])
def test_what_was_drawn_without_a_seed_is_drawn_anew(base, nli, tmp_path, seed, is_kept):
    settings = SamplingSettings(temperature=1.0, max_new_tokens=2, **seed)
    arguments = {"data_dir": nli, "num_samples": 1, "out": tmp_path / "out", "settings": settings}
    evaluate_multi_nli(base, **arguments)
    predictions = tmp_path / "out" / "predictions.jsonl"
    predictions.write_text(predictions.read_text().replace('"prediction": "', '"prediction": "kept '))
    evaluate_multi_nli(base, **arguments)
    assert ("kept " in predictions.read_text()) == is_kept


@pytest.mark.parametrize(("settings", "goes_on"), [({}, True), ({"temperature": 1.0}, False)])
def test_an_evaluation_that_is_interrupted_says_whether_it_goes_on(base, nli, tmp_path, caplog, settings, goes_on):
    def interrupt(num_rows):
        raise KeyboardInterrupt

    caplog.set_level("INFO", logger="smolora")
    rows = open_benchmark("multi_nli", nli, split="test", num_samples=2)
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(
            load_bundle(base),
            rows,
            settings=SamplingSettings(max_new_tokens=2, **settings),
            folder=tmp_path / "out",
            progress=interrupt,
        )
    assert ("the same command goes on from there" in caplog.text) == goes_on


def test_an_adapter_of_another_base_is_refused(base, nli, tmp_path):
    save_adapter(attach_adapter(load_bundle(base), LoRAConfig(r=2), seed=0), tmp_path / "adapter")
    other = save_tiny_model("gpt2", tmp_path / "other", seed=1, n_positions=256)
    with pytest.raises(ModelError, match="other"):
        evaluate_multi_nli(tmp_path / "adapter", str(other), data_dir=nli)


def test_only_labels_can_be_chosen_by_likelihood(base, tmp_path):
    (tmp_path / "testset_w_refs.csv").write_text("mr,ref\nname[A],A cat sat.\n")
    with pytest.raises(ConfigError, match="has no labels"):
        evaluate_benchmark("e2e_nlg", base, data_dir=tmp_path, by_likelihood=True)


def test_what_isnt_set_is_greedy_and_as_the_benchmark_wants_it(nli):
    source = open_benchmark("multi_nli", nli)
    assert fill_settings(None, source) == SamplingSettings(temperature=0, max_new_tokens=8, stop=("\n",))
    drawn = fill_settings(SamplingSettings(temperature=0.7), source)
    assert (drawn.temperature, drawn.max_new_tokens) == (0.7, 8)
    for greedy in ({}, {"temperature": 0.0}):
        with pytest.raises(ConfigError, match="seed and top_p would change nothing: .* set a temperature above 0"):
            fill_settings(SamplingSettings(top_p=0.9, seed=1, **greedy), source)
