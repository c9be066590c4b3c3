"""One section a method: what each reads, and what is said of what it doesn't."""

from __future__ import annotations

import re

import pytest
import yaml

from smolora.config import METHODS, ExperimentConfig, LoRAConfig, PEFTConfig, dump_config, resolve_config
from smolora.config.compatibility import NEEDS_FLOAT32, OBSTACLES, PHASELESS, find_obstacle
from smolora.errors import ConfigError


def resolve(*assignments, **layers):
    return resolve_config(ExperimentConfig, assignments=["model.name_or_path=x", *assignments], **layers)


def test_without_a_method_it_is_lora_with_its_promised_defaults():
    assert resolve().adapter == LoRAConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all")
    assert resolve("adapter.r=4").adapter == LoRAConfig(r=4)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_comes_back_from_its_yaml(method):
    bits = "4bit" if method == "loftq" else "none"
    config = resolve(f"adapter.method={method}", f"model.quantization={bits}")
    assert type(config.adapter) is METHODS[method]
    assert ExperimentConfig(**yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["adapter.method=ia33"], "adapter.method: no method 'ia33'. Did you mean 'ia3'? Methods: lora, rslora"),
        (["adapter.method=vera", "adapter.rr=3"], "adapter.rr: no such setting of vera. Did you mean 'r'? Known:"),
        (["adapter.method=ia3", "adapter.r=3"], "adapter.r: no such setting of ia3. Known: layers, method, path"),
        (["adapter.method=[lora]"], "adapter.method: no method ['lora']. Did you mean 'lora'?"),
        (["adapter.r=0"], "adapter.r: input should be greater than or equal to 1 (found 0)"),
        (["adapter.layers=x"], "adapter.layers: expected layers from 0, such as 4-11 or [0, 5] (found 'x')"),
        (["adapter.layers=5-3"], "adapter.layers: expected layers from 0, such as 4-11 or [0, 5] (found '5-3')"),
        (["adapter.method=dora", "adapter.target_modules=[]"], "adapter.target_modules: name at least one module"),
        (["adapter.method=full", "adapter.path=x"], "adapter.path: full trains the model itself"),
        (["adapter.method=adalora", "adapter.init_r=4"], "target_r must be below init_r = 4"),
    ],
)
def test_a_mistake_names_the_method_and_what_is_nearest(assignments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        resolve(*assignments)


@pytest.mark.parametrize(
    ("written", "meant"), [("4-6", (4, 5, 6)), ("[0, 5]", (0, 5)), ("3", (3,)), ("'0-1,7'", (0, 1, 7)), ("null", None)]
)
def test_layers_are_written_as_a_range_or_a_list(written, meant):
    assert resolve(f"adapter.layers={written}").adapter.layers == meant


def test_a_later_method_keeps_what_it_reads_of_an_earlier_one():
    preset = {"adapter": {"r": 4, "lora_dropout": 0.1, "target_modules": "both"}}
    assert resolve("adapter.method=vera", preset=preset).adapter == METHODS["vera"](r=4, target_modules="both")
    assert resolve("adapter.method=lora", preset=preset).adapter.lora_dropout == 0.1


@pytest.mark.parametrize(("name", "target"), [("lora_attention", "attention_only"), ("lora_mlp", "mlp_only")])
def test_predefined_configurations_are_lora_on_a_part(name, target):
    assert PEFTConfig.predefined(name) == LoRAConfig(target_modules=target)


def test_every_method_is_a_predefined_configuration_and_an_unknown_one_names_the_nearest():
    assert [PEFTConfig.predefined(name).method for name in METHODS] == list(METHODS)
    with pytest.raises(ConfigError, match="no configuration 'lora_mpl'. Did you mean 'lora_mlp'?"):
        PEFTConfig.predefined("lora_mpl")


def test_an_obstacle_is_said_before_a_model_is_loaded():
    found = find_obstacle(method="full", task="causal_lm", quantization="4bit", gradient_checkpointing=False)
    assert found in OBSTACLES
    said = r"^adapter.method: full can't be used here: weights of few bits .* lora\. See https://github.com/\S+/26248$"
    with pytest.raises(ConfigError, match=said):
        resolve("adapter.method=full", "model.quantization=4bit")
    assert find_obstacle(method="lora", task="causal_lm", quantization="4bit", gradient_checkpointing=True) is None


def test_every_row_of_the_table_names_methods_that_there_are():
    assert {method for row in OBSTACLES for method in row.methods} <= set(METHODS)
    assert {*NEEDS_FLOAT32, *PHASELESS} <= set(METHODS)


def test_half_precision_is_refused_with_where_upstream_says_why():
    with pytest.raises(
        ConfigError, match=r"full needs float32, found bfloat16: .*\. See https://github.com/pytorch/\S+$"
    ):
        resolve("adapter.method=full", "model.dtype=bfloat16")
    with pytest.raises(ConfigError, match=r"pissa needs float32, found bfloat16: .*\. Leave it out\.$"):
        resolve("adapter.method=pissa", "model.dtype=bfloat16")


def test_virtual_tokens_are_refused_where_the_answers_are_places_of_the_row():
    with pytest.raises(ConfigError, match="p_tuning can't be used here: the answers are at places of the row"):
        resolve("adapter.method=p_tuning", "model.task_type=qa")
    assert resolve("adapter.method=p_tuning", "model.task_type=classification").adapter.method == "p_tuning"
    assert resolve("adapter.method=prefix_tuning", "model.task_type=token_classification").adapter.path is None


@pytest.mark.parametrize("method", ["adalora", "ia3"])
def test_what_computes_in_float32_on_few_bits_refuses_another_type_there(method):
    with pytest.raises(ConfigError, match=f"model.dtype: {method} needs float32, found bfloat16: on layers"):
        resolve(f"adapter.method={method}", "model.quantization=8bit", "model.dtype=bfloat16")
    assert resolve(f"adapter.method={method}", "model.dtype=bfloat16").adapter.method == method
