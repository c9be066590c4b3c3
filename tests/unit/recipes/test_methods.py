"""Runs of every method: what they learn and leave, and that a stop changes no bit."""

from __future__ import annotations

import json
import os
import signal
from functools import cache

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from smolora.adapters.store import load_bundle
from smolora.config import ExperimentConfig, resolve_config
from smolora.errors import BrokenRunError, ConfigError, ModelError, StoppedBySignal
from smolora.recipes.finetune import finetune
from smolora.recipes.merge import merge
from smolora.training.adalora import AdaLoRACallback
from smolora.training.callback import Callback
from tests.tiny import random_input_ids, save_tiny_model

SOFT = ("prompt_tuning", "p_tuning", "prefix_tuning")
FAST = "training.learning_rate=3e-2"
NUMBERS = ["one", "two", "three", "four", "five", "six"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    pairs = [(f"{a} and {b}", f"{b} {a}") for a in NUMBERS for b in NUMBERS]
    file.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    return file


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model("llama", tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def tune_in(base, rows):
    """Return a function that makes a run of a method in a folder, or resumes it."""
    fixed = [
        f"model.name_or_path={base}",
        f"data.sources={rows}",
        "training.learning_rate=1e-2",
        "training.save_steps=2",
    ]

    def run(folder, method, *assignments, **options):
        assignments = [*fixed, f"adapter.method={method}", "training.max_steps=12", *assignments]
        return finetune(resolve_config(ExperimentConfig, assignments=assignments), folder, **options)

    return run


@pytest.fixture
def tune(tune_in, tmp_path):
    """Return a function that does so in a folder of this test's own."""
    return lambda method, name, *assignments, **options: tune_in(tmp_path / name, method, *assignments, **options)


@pytest.fixture(scope="module")
def whole(tune_in, tmp_path_factory):
    """Return a function that gives a run of a method that never stopped, for tests to read."""
    return cache(lambda method: tune_in(tmp_path_factory.mktemp(method) / "run", method, FAST))


class StopIn(Callback):
    """Asks the run to stop in a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, trainer):
        if trainer.state.step == self.step - 1:
            os.kill(os.getpid(), signal.SIGINT)


def losses_of(run):
    return [line["loss"] for line in map(json.loads, run.metrics.read_text().splitlines()) if "loss" in line]


def weights_of(run):
    file = run.adapter / "adapter_model.safetensors" if run.adapter.is_dir() else run.model / "model.safetensors"
    return file.read_bytes()


@pytest.mark.parametrize("method", ["rslora", "dora", "ia3", "vera", "layernorm", "adalora", "pissa", "full", *SOFT])
def test_a_run_lowers_the_loss(whole, method):
    losses = losses_of(whole(method))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "vera", "layernorm"])
def test_a_run_of_a_single_update_is_whole(tune, method):
    assert tune(method, "run", "training.max_steps=1").adapter.is_dir()


@pytest.mark.parametrize("step", [3, 10])  # While ranks are moved, and after the last time.
def test_a_stopped_adalora_run_resumes_to_the_same_bits(tune, whole, step):
    with pytest.raises(StoppedBySignal):
        tune("adalora", "run", FAST, callbacks=[StopIn(step)])
    assert weights_of(tune("adalora", "run", FAST, resume=True)) == weights_of(whole("adalora"))


def test_adalora_takes_ranks_away_as_many_as_asked_for(tune, base, caplog):
    caplog.set_level("INFO", logger="smolora")
    run = tune("adalora", "run", "adapter.init_r=4", "adapter.target_r=2")
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    ranks = [int(tensor.count_nonzero()) for name, tensor in tensors.items() if name.endswith(".lora_E")]
    assert sum(ranks) == 2 * len(ranks) == 28
    assert max(ranks) <= 4
    assert "28 of 56 are left" in caplog.text
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run.adapter)
    ids = random_input_ids(9)
    assert torch.equal(plain.eval()(ids).logits, load_bundle(run.path, dtype=torch.float32).model(ids).logits)


@pytest.fixture
def lowest_early(tmp_path):
    """Return settings that hold out what nobody learns, so that its loss is lowest early."""
    others = tmp_path / "others.jsonl"
    others.write_text("".join(json.dumps({"prompt": word, "completion": "zebra"}) + "\n" for word in NUMBERS))
    measured = ("training.eval_steps=1", "evaluation.verdict_share=0")
    return f"data.eval_source={others}", "training.learning_rate=5e-1", *measured


def test_the_adapter_that_is_kept_has_the_ranks_that_are_said(tune, lowest_early, caplog):
    caplog.set_level("INFO", logger="smolora")
    ranks = [f"adapter.{name}" for name in ("init_r=4", "target_r=2", "tinit=9", "tfinal=1", "deltaT=1")]
    run = tune("adalora", "run", *ranks, *lowest_early)
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    assert sum(int(tensor.count_nonzero()) for name, tensor in tensors.items() if name.endswith(".lora_E")) == 28
    losses = {line["step"]: line.get("eval_loss") for line in map(json.loads, run.metrics.read_text().splitlines())}
    assert min(losses, key=losses.get) < 10
    assert "28 of 56 are left" in caplog.text


def test_a_run_that_stops_early_says_that_ranks_were_still_to_be_taken_away(tune, lowest_early, caplog):
    caplog.set_level("INFO", logger="smolora")
    tune("adalora", "run", "evaluation.early_stopping_patience=1", "adapter.tfinal=1", *lowest_early)
    assert "still to be taken away up to update 11, so" in caplog.text
    assert "are left" not in caplog.text


class Forgetful(AdaLoRACallback):
    """What happens elsewhere: nobody calls the allocator."""

    def on_optimizer_step(self, trainer):
        pass


def test_an_adalora_run_that_took_no_rank_away_is_broken(tune, monkeypatch):
    monkeypatch.setattr("smolora.recipes.run_folder.AdaLoRACallback", Forgetful)
    with pytest.raises(BrokenRunError, match="AdaLoRA took no rank away: all 14 modules still have 12"):
        tune("adalora", "run")


def test_adalora_refuses_a_run_that_is_too_short_and_phases(tune, tmp_path):
    with pytest.raises(ConfigError, match="leave no update to reallocate ranks in a run of 2"):
        tune("adalora", "run", "training.max_steps=2")
    with pytest.raises(ConfigError, match="phases: adalora can't be trained in phases"):
        tune("adalora", "run", "phases.enabled=true")
    assert not (tmp_path / "run").exists()


def test_an_adalora_adapter_is_not_continued(tune, whole):
    with pytest.raises(ConfigError, match="AdaLoRA spreads its ranks over one run"):
        tune("lora", "more", f"adapter.path={whole('adalora').path}")


@pytest.mark.parametrize("method", [*SOFT, "pissa", "full"])
def test_a_stopped_run_resumes_to_the_same_bits(tune, whole, method):
    with pytest.raises(StoppedBySignal):
        tune(method, "run", FAST, callbacks=[StopIn(5)])
    assert weights_of(tune(method, "run", FAST, resume=True)) == weights_of(whole(method))


def test_virtual_tokens_refuse_phases_checkpointing_and_a_full_context_before_the_folder_is_made(tune, tmp_path):
    with pytest.raises(ConfigError, match="phases: p_tuning can't be trained in phases"):
        tune("p_tuning", "run", "phases.enabled=true")
    with pytest.raises(ConfigError, match="prefix_tuning can't be used here: its keys and values come in the cache"):
        tune("prefix_tuning", "run", "training.gradient_checkpointing=true")
    with pytest.raises(ConfigError, match="adapter.num_virtual_tokens = 64 leaves no room"):
        tune("prompt_tuning", "run", "adapter.num_virtual_tokens=64")
    assert not (tmp_path / "run").exists()


def test_phases_of_groups_that_a_method_leaves_alone_are_refused_with_phases_that_it_has(tune, tmp_path):
    with pytest.raises(
        ConfigError, match=r"\(attention and mlp\) trains nothing.*nothing else: .* early,late"
    ) as error:
        tune("layernorm", "run", "phases.strategy=both,mlp,attn")
    assert "--target" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_the_verdict_of_pissa_compares_with_the_whole_base(tune, rows):
    shared = (f"data.eval_source={rows}", "model.dtype=float32", "training.max_steps=3")
    shared += ("evaluation.verdict_share=1000",)  # All rows are asked, however busy the machine is.
    found = json.loads(tune("pissa", "run", *shared).verdict.read_text())
    other = json.loads(tune("lora", "other", *shared).verdict.read_text())
    assert found["loss"]["base"] == pytest.approx(other["loss"]["base"], rel=1e-5)
    assert 0 < found["movement"]["relative"] < 1


def test_pissa_refuses_half_precision_and_few_bits(tune):
    with pytest.raises(ConfigError, match="model.dtype: pissa needs float32, found bfloat16"):
        tune("pissa", "run", "model.dtype=bfloat16")
    with pytest.raises(ConfigError, match="pissa can't be used here: it takes its start out of the base's weights"):
        tune("pissa", "run", "model.quantization=4bit")
    with pytest.raises(ConfigError, match="loftq can't be used here: it starts from what quantising loses"):
        tune("loftq", "run")


def test_a_full_run_leaves_a_model_that_plain_transformers_opens_and_a_merge_isn_t_needed(tune, base, rows):
    run = tune("full", "run", f"data.eval_source={rows}", "training.max_steps=4", "training.learning_rate=1e-3")
    assert not run.adapter.exists()
    ids = random_input_ids(9)
    bundle = load_bundle(run.path)
    assert bundle.source == str(run.model.resolve())
    assert bundle.prompt_format is not None
    plain = AutoModelForCausalLM.from_pretrained(run.model).eval()
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}
    assert torch.equal(plain(ids).logits, bundle.model(ids).logits)
    before = load_bundle(base).model
    still = [
        name
        for (name, p), (_, q) in zip(plain.named_parameters(), before.named_parameters(), strict=True)
        if torch.equal(p, q)
    ]
    assert not still
    with pytest.raises(ModelError, match="It trained a whole model, which needs no merge"):
        merge(run.path)


def test_the_verdict_of_a_full_run_compares_with_the_base_from_disk(tune, rows):
    shared = (f"data.eval_source={rows}", "model.dtype=float32", "training.max_steps=3")
    shared += ("evaluation.verdict_share=1000",)  # All rows are asked, however busy the machine is.
    run = tune("full", "run", *shared, "training.learning_rate=1e-3")
    found, kept = json.loads(run.verdict.read_text()), (run.model / "model.safetensors").read_bytes()
    other = json.loads(tune("lora", "other", *shared).verdict.read_text())
    assert found["loss"]["base"] == pytest.approx(other["loss"]["base"], rel=1e-5)
    assert found["loss"]["tuned"] < found["loss"]["base"]
    assert 0 < found["movement"]["relative"] < 1
    assert "model.embed_tokens" in found["movement"]["modules"]
    again = tune("full", "run", *shared, "training.learning_rate=1e-3", resume=True)
    assert (again.model / "model.safetensors").read_bytes() == kept


def test_full_trains_in_phases_and_refuses_half_precision_and_an_adapter(tune):
    assert tune("full", "phased", "phases.strategy=both,mlp,attn").model.is_dir()
    with pytest.raises(ConfigError, match="model.dtype: full needs float32, found bfloat16"):
        tune("full", "run", "model.dtype=bfloat16")
    with pytest.raises(ConfigError, match="full trains the model itself"):
        tune("full", "run", "adapter.path=x")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.gradient_checkpointing=true", "its keys and values come in the cache"),
        ("phases.strategy=both,mlp,attn", "virtual tokens belong to no layer"),
        ("adapter.method=ia3", "is of the method prefix_tuning, and goes on as that; found ia3. Leave the method out"),
    ],
)
def test_an_adapter_is_continued_by_its_own_method_and_by_what_goes_with_it(tune, whole, tmp_path, setting, message):
    path = f"adapter.path={whole('prefix_tuning').path}"
    with pytest.raises(ConfigError, match=message):
        tune("lora", "second", path, setting)
    assert not (tmp_path / "second").exists()


def test_settings_that_a_continued_adapter_has_no_use_for_are_said_to_have_no_effect(tune, caplog):
    path = f"adapter.path={tune('lora', 'first', 'adapter.r=2', 'training.max_steps=2').path}"
    run = tune("lora", "second", path, "adapter.r=3", "training.max_steps=2")
    assert (
        f"adapter.r: no effect, since {run.path.parent / 'first' / 'adapter_checkpoint'} keeps its own" in caplog.text
    )
    assert json.loads((run.adapter / "adapter_config.json").read_text())["r"] == 2
