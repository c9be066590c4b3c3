"""How far an adapter moves weights, against the merged weights themselves."""

from __future__ import annotations

import pytest
import torch

from smolora.adapters.attach import attach_adapter
from smolora.adapters.movement import measure_movement
from smolora.adapters.store import load_adapter
from smolora.config import LoRAConfig
from smolora.config.adapter import METHODS
from smolora.models.loading import load_model
from tests.tiny import save_tiny_encoder, tiny_bundle


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_norms_are_those_of_the_merged_weights(tmp_path, family):
    bundle = attach_adapter(tiny_bundle(family, tmp_path / "base"), LoRAConfig(r=2), seed=0)
    before = {name: value.clone() for name, value in bundle.model.get_base_model().state_dict().items()}
    with torch.no_grad():
        for name, parameter in bundle.model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    found = measure_movement(bundle)
    merged = bundle.model.merge_and_unload().state_dict()
    moved, held = 0.0, 0.0
    for module, value in found.modules.items():
        weight = before[f"{module}.base_layer.weight"]
        change = merged[f"{module}.weight"] - weight
        assert value == pytest.approx((change.norm() / weight.norm()).item(), rel=1e-3)
        moved, held = moved + change.square().sum().item(), held + weight.square().sum().item()
    assert found.relative == pytest.approx((moved / held) ** 0.5, rel=1e-3)


def test_a_bias_that_lora_brings_along_moves_its_module(save_peft_pair):
    base, adapter = save_peft_pair(target_modules=["q_proj"], lora_bias=True)
    assert measure_movement(load_adapter(load_model(base), adapter)).num_still == 0


def test_a_fresh_adapter_moves_nothing(tmp_path):
    found = measure_movement(attach_adapter(tiny_bundle("llama", tmp_path / "base"), LoRAConfig(), seed=0))
    assert (found.relative, found.num_still) == (0.0, 14)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_behind_virtual_tokens_a_head_is_what_moves(tmp_path, method):
    base = load_model(save_tiny_encoder("bert", tmp_path), task="classification", labels=("no", "yes"))
    bundle = attach_adapter(base, METHODS[method](num_virtual_tokens=2), seed=0)
    assert measure_movement(bundle).modules == {"classifier": 0.0}
    with torch.no_grad():
        bundle.model.get_base_model().classifier.modules_to_save["default"].weight.mul_(1.5)
    assert measure_movement(bundle).modules == {"classifier": pytest.approx(0.5)}


def test_a_bundle_without_an_adapter_has_no_modules(tmp_path):
    assert measure_movement(tiny_bundle("llama", tmp_path / "base")).modules == {}


@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
def test_a_head_of_several_layers_is_held_against_the_base_s_own(tmp_path, method):
    base = load_model(save_tiny_encoder("roberta", tmp_path), task="classification", labels=("no", "yes"))
    bundle = attach_adapter(base, METHODS[method](), seed=0)
    with torch.no_grad():
        for layer in bundle.model.get_base_model().classifier.modules_to_save["default"].children():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.mul_(1.5)
    moved = {name: value for name, value in measure_movement(bundle).modules.items() if value}
    assert moved == {f"classifier.{name}": pytest.approx(0.5) for name in ("dense", "out_proj")}
