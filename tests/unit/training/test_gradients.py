"""Gradient norms: exact sums, A and B apart, null for what is frozen, and a log that survives what kills a run."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from smolora.adapters.attach import attach_adapter, setup_model_with_lora
from smolora.adapters.fast_path import fast_path
from smolora.adapters.tensor_places import find_lora_pairs, locate_tensors, read_anatomy
from smolora.config import DoRAConfig, ExperimentConfig, GPTConfig, LoRAConfig, PiSSAConfig, SpeedConfig, resolve_config
from smolora.models.anatomy import build_anatomy
from smolora.models.gpt import GPTModel
from smolora.recipes.finetune import finetune
from smolora.records.gradient_log import GradientNormLog
from smolora.records.run_dir import RunDir
from smolora.training.callback import Callback
from smolora.training.gradients import GradientMeter, GradientNormCallback, measure_delta_norms, measure_gradient_norms
from tests.resident import resident_bytes
from tests.tiny import FAMILIES, random_input_ids, save_tiny_model, tiny_bundle, tiny_model


def backward(model):
    ids = random_input_ids(12)
    output = model(ids)
    logits = output if isinstance(output, torch.Tensor) else output.logits
    F.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    return model


def adapted(family, *, b=0.1, **settings):
    """A tiny model with an adapter whose B isn't zero any more."""
    model = setup_model_with_lora(tiny_model(family), LoRAConfig(r=2, **settings))
    with torch.no_grad():
        for pair in find_lora_pairs(model):
            pair.b.normal_(std=b, generator=torch.Generator().manual_seed(0)) if b else None
    return model


def total_of(gradients):
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))


def root_of_squares(norms):
    return math.sqrt(sum(norm**2 for norm in norms if norm is not None))


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_layers_and_modules_each_add_up_to_the_total_on_every_family(family):
    model = backward(adapted(family))
    norms = measure_gradient_norms(model)
    expected = total_of(p.grad for p in model.parameters() if p.grad is not None)
    groups = {name: norm for name, norm in norms.groups.items() if name != "total"}
    # Each norm is a float32, so sums of their squares are exact to about 1e-7.
    for parts in ([norms.groups["total"]], groups.values(), norms.layers.values(), norms.modules.values()):
        assert root_of_squares(parts) == pytest.approx(expected, rel=1e-6)
    assert root_of_squares(norms.matrices.values()) == pytest.approx(expected, rel=1e-6)
    assert groups["attention"] > 0
    assert groups["mlp"] > 0
    assert groups["embed"] is groups["lm_head"] is None


def test_a_whole_gpt_has_norms_of_embedding_and_norm_modules_too():
    model = backward(GPTModel(GPTConfig(num_layers=2, num_heads=2, width=16, context=32, vocab_size=300, bias=True)))
    norms = measure_gradient_norms(model)
    assert list(norms.groups) == ["attention", "mlp", "embed", "lm_head", "norm", "total"]
    assert norms.groups["lm_head"] is None, "it is tied to the embedding"
    parts = [norm for name, norm in norms.groups.items() if name != "total"]
    assert root_of_squares(parts) == pytest.approx(total_of(p.grad for p in model.parameters()), rel=1e-6)


def test_a_norm_is_that_of_the_tensors_it_is_named_after():
    model = backward(adapted("gpt2"))
    norms = measure_gradient_norms(model)
    mlp = [p.grad for name, p in model.named_parameters() if ".h.1.mlp." in name and p.grad is not None]
    assert norms.layers["layer_1_mlp"] == pytest.approx(total_of(mlp), rel=1e-6)
    fc = {name: p.grad for name, p in model.named_parameters() if ".h.0.mlp.c_fc." in name and p.grad is not None}
    assert norms.modules["transformer.h.0.mlp.c_fc"] == pytest.approx(total_of(fc.values()), rel=1e-6)
    [b] = [gradient for name, gradient in fc.items() if "lora_B" in name]
    assert norms.module_matrices["transformer.h.0.mlp.c_fc/B"] == pytest.approx(total_of([b]), rel=1e-6)


def test_a_is_exactly_zero_while_b_is_zero():
    norms = measure_gradient_norms(backward(adapted("llama", b=0)))
    assert norms.matrices["A"] == 0.0
    assert norms.matrices["B"] > 0.0


def test_what_is_frozen_is_null_and_not_zero():
    model = adapted("llama")
    for name, parameter in model.named_parameters():
        if ".mlp." in name:
            parameter.requires_grad_(False)
    norms = measure_gradient_norms(backward(model))
    assert norms.groups["mlp"] is norms.layers["layer_0_mlp"] is norms.modules["model.layers.0.mlp.up_proj"] is None
    assert norms.groups["attention"] == norms.groups["total"]


def test_a_model_without_gradients_has_no_total():
    assert measure_gradient_norms(adapted("llama")).groups["total"] is None


def test_norms_of_bfloat16_gradients_are_summed_in_float32():
    model = torch.nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    model.weight.grad = torch.full((64, 64), 3.0, dtype=torch.bfloat16)
    places = locate_tensors(["weight"], build_anatomy(tiny_model("llama")))
    meter = GradientMeter({"weight": model.weight}, places)
    assert meter.read(meter.measure()).groups["total"] == 192.0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_delta_of_a_module_is_the_norm_of_the_whole_product(family):
    pairs = find_lora_pairs(adapted(family, lora_alpha=6))
    found = measure_delta_norms(pairs)
    expected = {pair.module: (3.0 * pair.b @ pair.a).norm() for pair in pairs}
    assert_close({name: norm.detach() for name, norm in found.items()}, expected, rtol=1e-5, atol=0)


def test_a_fresh_adapter_has_no_delta():
    deltas = measure_delta_norms(find_lora_pairs(adapted("llama", b=0)))
    assert {delta.item() for delta in deltas.values()} == {0.0}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_delta_of_pissa_is_what_training_changed_of_the_base(family, tmp_path):
    base = tiny_bundle(family, tmp_path)
    before = {name: weight.clone() for name, weight in base.model.state_dict().items()}
    bundle = attach_adapter(base, PiSSAConfig(r=2), seed=0)
    pairs = find_lora_pairs(bundle.model, bundle.taken)
    with torch.no_grad():
        for pair in pairs:
            pair.a.mul_(1.1)
            pair.b.add_(0.01)
    found, held = measure_delta_norms(pairs), {pair.module: pair.measure_base() for pair in pairs}
    merged = bundle.model.merge_and_unload().state_dict()
    changes = {module: (merged[f"{module}.weight"] - before[f"{module}.weight"]).norm() for module in found}
    assert_close({name: norm.detach() for name, norm in found.items()}, changes, rtol=1e-3, atol=0)
    assert_close(held, {module: before[f"{module}.weight"].norm() for module in held}, rtol=1e-5, atol=0)


def test_dora_has_no_delta_since_its_change_is_no_product():
    assert not find_lora_pairs(setup_model_with_lora(tiny_model("llama"), DoRAConfig(r=2)))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapted_model_has_the_anatomy_of_its_plain_one(family):
    plain = build_anatomy(tiny_model(family))
    assert read_anatomy(adapted(family)) == plain


class Snoop(Callback):
    """Keeps what the measuring callback has to agree with."""

    def __init__(self):
        self.totals, self.moves = {}, {}

    def on_gradients(self, trainer):
        self.totals[trainer.state.step + 1] = total_of(p.grad for p in trainer.parameters.values())
        self.before = {name: p.detach().clone() for name, p in trainer.parameters.items()}

    def on_step_end(self, trainer, record):
        self.moves[record.step] = {
            name: float((p.detach() - self.before[name]).norm() / p.detach().norm())
            for name, p in trainer.parameters.items()
        }


def test_every_logged_step_has_a_row_with_the_unclipped_total(make_trainer, run):
    snoop = Snoop()
    measuring = GradientNormCallback(GradientNormLog(run.path))
    settings = {"max_steps": 7, "logging_steps": 3, "max_grad_norm": 1e-3}
    make_trainer(run_dir=run, callbacks=[snoop, measuring], **settings).train()
    rows = GradientNormLog(run.path).read_groups()
    assert [row["step"] for row in rows] == [1, 3, 6, 7]
    lines = {line["step"]: line for line in map(json.loads, run.metrics.read_text().splitlines())}
    for row in rows:
        assert row["total"] == pytest.approx(snoop.totals[row["step"]], rel=1e-6)
        assert row["total"] == pytest.approx(lines[row["step"]]["grad_norm"], rel=1e-6)


def test_the_columns_are_those_of_the_contract(tmp_path, tuned):
    header = (tuned.path / "gradient_analysis.group_norms.csv").read_text().splitlines()[0]
    assert header == "step,phase,active,attention,mlp,embed,lm_head,total"
    header = (tuned.path / "gradient_analysis.layer_norms.csv").read_text().splitlines()[0]
    assert header == "step,phase,layer_0_attention,layer_0_mlp,layer_1_attention,layer_1_mlp"


def test_a_run_that_a_callback_ends_has_a_row_of_its_last_step(make_trainer, run):
    class Stop(Callback):
        def on_step_end(self, trainer, record):
            trainer.state.should_stop = record.step == 4

    measuring = GradientNormCallback(GradientNormLog(run.path))
    make_trainer(run_dir=run, callbacks=[Stop(), measuring], logging_steps=3).train()
    assert [row["step"] for row in GradientNormLog(run.path).read_groups()] == [1, 3, 4]


def test_the_update_ratio_is_how_far_the_step_moved_the_weights(make_trainer, run):
    snoop, measuring = Snoop(), GradientNormCallback(GradientNormLog(run.path))
    make_trainer(run_dir=run, callbacks=[snoop, measuring], max_steps=3, logging_steps=1).train()
    modules = json.loads(run.gradient_summary.read_text())["modules"]
    expected = [moves["position_embedding.weight"] for moves in snoop.moves.values()]
    found = modules["position_embedding"]["update_ratio"]
    assert found["mean"] == pytest.approx(sum(expected) / 3, rel=1e-5)
    assert (found["count"], found["last"]) == (3, pytest.approx(expected[-1], rel=1e-5))


def test_the_summary_of_a_tuning_run_says_what_moved(tuned):
    summary = json.loads(tuned.gradient_summary.read_text())
    assert set(summary) == {"groups", "matrices", "modules", "phases"}
    assert set(summary["groups"]["attention"]) == {"norm", "update_ratio", "delta_ratio"}
    assert summary["matrices"]["A"]["norm"]["max"] > 0
    module = summary["modules"]["model.layers.0.mlp.up_proj"]
    assert (module["group"], module["layer"]) == ("mlp", 0)
    assert set(module) == {"group", "layer", "norm", "A", "B", "update_ratio", "delta_norm", "delta_ratio"}
    assert summary["phases"]["0"]["active"] == GradientNormLog(tuned.path).read_groups()[0]["active"]


@pytest.mark.parametrize("step", [2, 3])
def test_files_and_summary_go_on_through_a_resume_as_if_nothing_had_happened(make_trainer, run, tmp_path, step):
    class Crash(Callback):
        def on_step_begin(self, trainer):
            if trainer.state.step == step:
                raise ZeroDivisionError

    def measured(run, *more, resume=False):
        callbacks = [*more, GradientNormCallback(GradientNormLog(run.path))]
        make_trainer(run_dir=run, callbacks=callbacks, logging_steps=1, save_steps=2).train(resume=resume)
        names = ("group_norms", "layer_norms", "gradient_summary")
        return [vars(run)[name].read_text() for name in names]

    whole = RunDir(tmp_path / "whole")
    whole.path.mkdir()
    expected = measured(whole)
    with pytest.raises(ZeroDivisionError):
        measured(run, Crash())
    with run.group_norms.open("a") as file:
        file.write("4,0,12")  # Torn by the kill.
    assert measured(run, resume=True) == expected


def test_measuring_changes_no_bit_of_a_run(make_trainer):
    plain, measured = make_trainer(dropout=0.2), make_trainer(dropout=0.2, callbacks=[GradientNormCallback()])
    plain.train()
    measured.train()
    assert_close(
        dict(measured.bundle.model.named_parameters()), dict(plain.bundle.model.named_parameters()), rtol=0, atol=0
    )


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere pages are left to the system")
@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no weight is packed: this CPU computes no bfloat16 itself"
)
@pytest.mark.parametrize("is_fast", [True, False])
def test_weights_that_were_read_leave_memory_only_where_they_are_held_packed(tmp_path, is_fast):
    base = tiny_bundle("llama", tmp_path, dtype=torch.bfloat16, hidden_size=512, intermediate_size=2048)
    bundle = attach_adapter(base, LoRAConfig(), seed=0)
    file = tmp_path / "model.safetensors"
    with fast_path(bundle, SpeedConfig(fused_lora=is_fast), is_packed=True):
        GradientNormCallback().begin(bundle.model, {}, bundle.anatomy)
        share = resident_bytes(file) / file.stat().st_size
    assert share < 0.3 if is_fast else share > 0.8  # The embedding and the head are in use in any case.


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A short tuning run through the recipe."""
    folder = tmp_path_factory.mktemp("tuned")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"the cat {number} sat"}) + "\n" for number in range(20)))
    settings = [f"model.name_or_path={save_tiny_model('llama', folder / 'base')}", f"data.sources={rows}"]
    steps = ["training.max_steps=4", "training.logging_steps=2", "model.dtype=float32"]
    return finetune(resolve_config(ExperimentConfig, assignments=[*settings, *steps]), folder / "run")
