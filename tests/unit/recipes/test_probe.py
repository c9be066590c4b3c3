"""A probe proposes what train takes: planted gradients are found, the budget holds, and a seed decides."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from smolora.config import ExperimentConfig, resolve_config
from smolora.errors import ConfigError
from smolora.recipes.finetune import finetune
from smolora.recipes.probe import probe
from smolora.recipes.probe_config import plan_probe
from smolora.training.gradient_mass import GradientMass, ModuleMass
from tests.tiny import save_tiny_model

SILENT = ("q_proj", "k_proj", "v_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A llama whose last attention writes nothing, so that nothing before its output has a gradient."""
    folder = save_tiny_model("llama", tmp_path_factory.mktemp("probe") / "base")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("probe") / "rows.jsonl"
    pairs = [(f"the {a} of {b}", f"{b} {a}") for a in "abcdefgh" for b in "klmnopqr"]
    file.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    return file


def config(base, rows, *assignments):
    settings = [f"model.name_or_path={base}", f"data.sources={rows}", "model.dtype=float32", "adapter.r=4"]
    return resolve_config(ExperimentConfig, assignments=[*settings, "training.max_steps=20", *assignments])


@pytest.fixture(scope="module")
def probed(base, rows, tmp_path_factory):
    return probe(config(base, rows), tmp_path_factory.mktemp("probe") / "probed", num_batches=4)


def test_modules_without_a_gradient_are_not_adapted(probed):
    proposed = yaml.safe_load(probed.config.read_text())["adapter"]["target_modules"]
    assert not [name for name in proposed if name.startswith("model.layers.1.") and name.endswith(SILENT)]
    assert [name for name in proposed if name.startswith("model.layers.0.") and name.endswith(SILENT)]


def test_train_takes_what_the_probe_wrote(probed, tmp_path):
    proposed = resolve_config(ExperimentConfig, file=probed.config)
    assert not proposed.phases.is_on, "phases are proposed, and cost loss in every comparison so far"
    run = finetune(resolve_config(ExperimentConfig, file=probed.config, assignments=["phases.enabled=true"]), tmp_path)
    adapter = json.loads((run.adapter / "adapter_config.json").read_text())
    figures = json.loads(probed.figures.read_text())
    ranks = {module["module"]: module["rank"] for module in figures["modules"] if module["rank"]}
    assert adapter["rank_pattern"] == ranks
    assert adapter["alpha_pattern"] == {name: 4.0 * rank for name, rank in ranks.items()}
    assert len(json.loads(run.phase_report.read_text())["phases"]) == 3


def test_the_proposal_states_its_reasons(probed):
    text = probed.config.read_text()
    assert "# Measured over 4 batches without an update" in text
    assert "of that in one direction" in text
    assert "in a uniform rank of 4 could hold" in text
    assert probed.plot.read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_writes_the_same_bytes(base, rows, probed, tmp_path):
    again = probe(config(base, rows), tmp_path / "again", num_batches=4)
    for one, other in ((again.config, probed.config), (again.figures, probed.figures)):
        assert one.read_bytes() == other.read_bytes()


def test_no_row_is_in_both_halves(base, rows, tmp_path):
    asked = config(base, rows, "training.per_device_train_batch_size=16", "data.validation_fraction=0")
    assert json.loads(probe(asked, tmp_path / "few").figures.read_text())["batches"] == 4
    with pytest.raises(ConfigError, match="found 1. Where the rows fill no more"):
        probe(asked.replace(training=asked.training.replace(per_device_train_batch_size=64)), tmp_path / "one")


def test_a_probe_is_not_written_over(base, rows, probed):
    with pytest.raises(ConfigError, match="already holds a probe"):
        probe(config(base, rows), probed.path)


def test_an_adapter_to_continue_is_refused(base, rows, tmp_path):
    with pytest.raises(ConfigError, match="there is none to continue"):
        probe(config(base, rows, "adapter.path=other"), tmp_path / "out")


def module(name, group, *spectrum, cost=10, largest_rank=99):
    mass = sum(spectrum)
    return ModuleMass(name, group, 0, mass, cost, largest_rank, mass / (cost * 32), spectrum)


def plan(*modules, r=8, total_steps=100):
    return plan_probe(GradientMass(modules, 1.0, 2.0), r=r, total_steps=total_steps)


def test_a_large_gradient_in_one_direction_gets_one_unit_of_rank():
    proposed = plan(module("a", "mlp", 9.0, 0.01, 0.01), module("b", "mlp", 1.0, 0.9, 0.8), r=2)
    assert proposed.ranks == {"a": 1, "b": 3}
    assert proposed.spent == proposed.budget == 40
    assert proposed.held_by(proposed.ranks) > proposed.held_by({"a": 2, "b": 2})


def test_a_unit_of_rank_goes_where_it_holds_most_per_parameter():
    proposed = plan(module("a", "mlp", 2.0, 1.0, cost=20), module("b", "mlp", 3.0, 1.5, cost=10), r=1)
    assert proposed.ranks == {"b": 2}
    assert proposed.spent == 20 < proposed.budget == 30


def test_no_rank_is_more_than_four_times_the_asked_one():
    assert plan(module("a", "mlp", *[1.0] * 99), *[module(n, "mlp", 0.0) for n in "bcdefgh"]).ranks == {"a": 32}


def test_no_rank_is_past_what_the_weight_can_have():
    assert plan(module("a", "mlp", *[1.0] * 8, largest_rank=3), module("b", "mlp", 0.0)).ranks == {"a": 3}


def test_each_group_gets_its_share_of_the_second_half():
    phases = plan(module("a", "attention", 1.0), module("b", "mlp", 3.0)).phases
    assert [(phase.groups, phase.start and phase.start.fraction) for phase in phases] == [
        ((), None),
        (("mlp",), 0.5),
        (("attention",), 0.875),
    ]


@pytest.mark.parametrize(("mass", "total_steps"), [(1.0, 19), (0.3, 100)])
def test_a_short_run_or_one_group_alone_gets_no_phases(mass, total_steps):
    assert plan(module("a", "attention", mass), module("b", "mlp", 3.0), total_steps=total_steps).phases == ()
