"""Phases as configuration: strategies by name, tables, and what can't be written."""

from __future__ import annotations

import pytest
import yaml

from smolora.config import DynamicLoRAConfig, ExperimentConfig, PhaseStart, dump_config, resolve_config
from smolora.config.phases import normalise_strategy, resolve_starts
from smolora.errors import ConfigError


def starts_of(config, *, total_steps=30, steps_per_epoch=10, recorded=()):
    return resolve_starts(config.phases, total_steps=total_steps, steps_per_epoch=steps_per_epoch, recorded=recorded)


@pytest.mark.parametrize("spelling", ["both,mlp,attn", "both->mlp->attn", "both → mlp → attn", "Both=>MLP=>attention"])
def test_arrows_commas_and_spaces_name_the_same_strategy(spelling):
    assert normalise_strategy(spelling) == "both,mlp,attn"
    assert DynamicLoRAConfig(strategy=spelling) == DynamicLoRAConfig(strategy="both,mlp,attn")


def test_an_arrow_in_yaml_is_a_strategy(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: {name_or_path: m}\nphases: {strategy: attn→mlp→both}\n", encoding="utf-8")
    assert resolve_config(ExperimentConfig, file=file).phases.strategy == "attn,mlp,both"


def test_an_unknown_strategy_names_the_nearest():
    with pytest.raises(ConfigError, match=r"phases\.strategy: .*Did you mean 'both,mlp,attn'\?.*found 'both,mpl,attn'"):
        ExperimentConfig(model={"name_or_path": "m"}, phases={"strategy": "both,mpl,attn"})


def test_phases_are_off_until_something_is_set():
    assert not DynamicLoRAConfig().is_on
    assert DynamicLoRAConfig().phases == ()
    assert all(DynamicLoRAConfig(**given).is_on for given in ({"enabled": True}, {"strategy": "early,late"}))
    assert not DynamicLoRAConfig(enabled=False, strategy="early,late").is_on


def test_ends_alone_are_those_of_both_mlp_attn():
    config = DynamicLoRAConfig(phase1_end=10, phase2_end=20)
    assert [phase.groups for phase in config.phases] == [("attention", "mlp"), ("mlp",), ("attention",)]
    assert starts_of(config) == [0, 10, 20]


def test_without_ends_the_phases_share_the_run_equally():
    assert starts_of(DynamicLoRAConfig(strategy="both,mlp,attn"), total_steps=10) == [0, 3, 6]
    assert starts_of(DynamicLoRAConfig(strategy="early,late"), total_steps=10) == [0, 5]


def test_dynamic_lora_is_another_name_of_the_section_phases():
    config = ExperimentConfig(model={"name_or_path": "m"}, phases={"strategy": "early,late"})
    assert config.dynamic_lora is config.phases


def test_a_dumped_table_reads_back_equal():
    table = [{"groups": "mlp"}, {"layers": [0, 1], "start": 5}, {"start": {"plateau": {"patience": 3}}}]
    config = ExperimentConfig(model={"name_or_path": "m"}, phases={"table": table, "moments": "reset"})
    assert ExperimentConfig(**yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "both,mlp,attn", "phase1_end": 4}, "takes both or none"),
        ({"strategy": "both,mlp,attn", "phase2_end": 4}, "takes both or none"),
        ({"phase1_end": 4, "phase2_end": 4}, "phase2_end: must come after phase1_end=4"),
        ({"strategy": "early,late", "phase1_end": 2, "phase2_end": 4}, "early,late has two phases"),
        ({"strategy": "early,late", "table": [{}]}, "a strategy with its ends, or a table"),
        ({"table": [{"start": 3}, {"start": 5}]}, r"table\.0\.start: the first phase begins with the run"),
        ({"table": [{}, {"start": 5}, {}]}, r"table\.2\.start is missing"),
        ({"table": [{}, {"start": 0}]}, "phase 1 would have no update"),
        (
            {"table": [{}, {"start": 5}, {"start": 5}]},
            r"table\.2\.start: phase 3 starts at step 5, which doesn't come after step 5, where phase 2 starts",
        ),
        (
            {"table": [{}, {"start": {"epoch": 2}}, {"start": {"epoch": 1}}]},
            "epoch 1.0, which doesn't come after epoch 2.0",
        ),
        ({"table": [{}, {"start": {"plateau": {}}}, {"start": 9}]}, "only a plateau can follow"),
        ({"table": [{}, {"start": {"step": 1, "epoch": 1}}]}, "give exactly one, found step, epoch"),
        ({"table": [{}, {"start": {}}]}, "give exactly one, found none"),
        ({"table": [{"groups": ["attn"]}]}, r"table\.0\.groups\.0: input should be 'attention', 'mlp'"),
        ({"table": [{"layers": [3, 1]}]}, "first <= last"),
        ({"table": [{"layer": [1, 3]}]}, "Did you mean 'layers'"),
    ],
)
def test_what_makes_no_plan_is_refused_by_name(settings, message):
    with pytest.raises(ConfigError, match=message):
        DynamicLoRAConfig(**settings)


@pytest.mark.parametrize(
    ("starts", "total_steps", "message"),
    [
        ([20, 25], 25, "phase 3 starts after 25 updates and would have none, since the run has 25"),
        ([20, 25], 22, "phase 3 starts after 25"),
        ([{"epoch": 1}, {"fraction": 0.2}], 30, "phase 2 starts after 10 .* since phase 3 starts there after 6"),
    ],
)
def test_a_phase_without_an_update_is_refused_once_the_length_is_known(starts, total_steps, message):
    config = DynamicLoRAConfig(table=[{}, *({"start": start} for start in starts)])
    with pytest.raises(ConfigError, match=message):
        starts_of(config, total_steps=total_steps)


def test_too_few_steps_for_equal_shares_are_refused():
    with pytest.raises(ConfigError, match="a run of 2 steps can't hold 3 phases"):
        starts_of(DynamicLoRAConfig(enabled=True), total_steps=2)


def test_too_few_steps_are_refused_before_anything_is_loaded_unless_starts_wait_for_the_data():
    strategy = {"phases.strategy": "both,mlp,attn", "training.max_steps": 2}
    with pytest.raises(ConfigError, match="^phases: a run of 2 steps can't hold 3 phases"):
        resolve_config(ExperimentConfig, flags={"model.name_or_path": "base", **strategy})
    table = {"phases.table": [{}, {"start": {"epoch": 3}}], "training.max_steps": 2}
    resolve_config(ExperimentConfig, flags={"model.name_or_path": "base", **table})


def test_recorded_starts_stay_whatever_the_run_has_become():
    config = DynamicLoRAConfig(enabled=True)
    assert starts_of(config, total_steps=90, recorded=[0, 10, 20]) == [0, 10, 20]
    with pytest.raises(ConfigError, match="phase 3 starts after 20"):
        starts_of(config, total_steps=15, recorded=[0, 10, 20])


def test_a_plateau_has_no_start_yet():
    config = DynamicLoRAConfig(table=[{}, {"start": PhaseStart(plateau={"metric": "loss"})}])
    assert starts_of(config) == [0, None]
