"""PiSSA and LoftQ: they start as parts of the base, and what they save goes on the base as it was."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from smolora.adapters.attach import attach_adapter, quiet_peft, setup_model_with_lora
from smolora.adapters.changes import find_changes
from smolora.adapters.merge import merge_adapter
from smolora.adapters.movement import measure_movement
from smolora.adapters.state import training_tensors
from smolora.adapters.store import load_bundle, save_adapter
from smolora.adapters.toggling import disabled_adapter
from smolora.config.adapter import LoftQConfig, LoRAConfig, PiSSAConfig
from smolora.errors import ConfigError
from smolora.models.loading import load_model
from tests.tiny import WHOLE_BLOCKS, needs_bitsandbytes, random_input_ids, save_tiny_model, tiny_bundle, tiny_model
from tests.unit.adapters.test_methods import move

IDS = random_input_ids(12)


@torch.no_grad()
def logits_of(model):
    return model(IDS).logits


def attach(bundle, config):
    adapted = attach_adapter(bundle, config, seed=3)
    adapted.model.eval()
    return adapted


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("settings", [{}, {"num_iterations": 4}, {"rank_pattern": {}}])
def test_pissa_saves_what_goes_on_the_base_as_it_was(tmp_path, family, settings):
    if "rank_pattern" in settings:
        name = {"llama": "q_proj", "gpt2": "c_attn", "opt": "q_proj"}[family]
        settings = {"rank_pattern": {name: 2}, "alpha_pattern": {name: 3.0}}
    base = save_tiny_model(family, tmp_path / "base")
    before = logits_of(load_model(base).model)
    bundle = attach(load_model(base), PiSSAConfig(r=4, lora_dropout=0.0, **settings))
    # W - s B A + s B A is W up to rounding; the logits are up to 10 in size.
    torch.testing.assert_close(logits_of(bundle.model), before, atol=1e-5, rtol=1e-5)
    move(bundle.model)
    expected = logits_of(bundle.model)
    assert (expected - before).abs().max() > 0.1
    with disabled_adapter(bundle):
        torch.testing.assert_close(logits_of(bundle.model), before, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits_of(bundle.model), expected)
    save_adapter(bundle, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(load_bundle(tmp_path / "adapter").model), expected, atol=1e-4, rtol=1e-4)
    with quiet_peft():
        plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_of(plain), expected, atol=1e-4, rtol=1e-4)
    assert plain.peft_config["default"].init_lora_weights is True
    merge_adapter(tmp_path / "adapter", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of(merged), expected, atol=1e-4, rtol=1e-4)
    weights, found = load_model(base).model.state_dict(), measure_movement(bundle)
    for module, moved in found.modules.items():
        weight, after = weights[f"{module}.weight"], merged.state_dict()[f"{module}.weight"]
        assert moved == pytest.approx(((after - weight).norm() / weight.norm()).item(), rel=1e-3)


def test_pissa_moves_nothing_at_its_start(tmp_path):
    bundle = attach(tiny_bundle("llama", tmp_path), PiSSAConfig(r=4))
    assert measure_movement(bundle).relative < 1e-6


def test_pissa_keeps_a_task_s_head_as_it_is(tmp_path):
    base = save_tiny_model("llama", tmp_path / "base")
    bundle = attach(load_model(base, task="classification", labels=("a", "b", "c")), PiSSAConfig(r=4))
    move(bundle.model)
    save_adapter(bundle, tmp_path / "adapter")
    torch.testing.assert_close(
        logits_of(load_bundle(tmp_path / "adapter").model), logits_of(bundle.model), atol=1e-4, rtol=1e-4
    )
    assert "score" in measure_movement(bundle).modules
    assert any(".modules_to_save." in name for name in training_tensors(bundle))


def test_pissa_starts_with_the_largest_directions(tmp_path):
    base = save_tiny_model("llama", tmp_path)
    weight = load_model(base).model.get_submodule("model.layers.0.mlp.up_proj").weight.detach()
    changes = find_changes(attach(load_model(base), PiSSAConfig(r=4)).model)
    start = changes["model.layers.0.mlp.up_proj.weight"].apply(torch.zeros_like(weight))
    u, s, vh = torch.linalg.svd(weight)
    torch.testing.assert_close(start, u[:, :4] @ s[:4].diag() @ vh[:4], atol=1e-5, rtol=1e-5)


def test_what_needs_the_base_s_files_takes_a_bundle():
    for config in (PiSSAConfig(), LoftQConfig()):
        with pytest.raises(ConfigError, match="needs the base's files"):
            setup_model_with_lora(tiny_model("llama"), config)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["8bit", "4bit"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loftq_starts_nearer_to_what_was_quantised_and_lora_does_not(tmp_path, kind, family):
    base = save_tiny_model(family, tmp_path / "base", **WHOLE_BLOCKS[family])
    plain = logits_of(load_model(base).model)
    far = (logits_of(attach(load_model(base, quantization=kind), LoRAConfig(r=32)).model) - plain).norm()
    bundle = attach(load_model(base, quantization=kind), LoftQConfig(r=32, lora_dropout=0.0))
    near = (logits_of(bundle.model) - plain).norm()
    assert near < 0.7 * far
    save_adapter(bundle, tmp_path / "adapter")
    assert torch.equal(logits_of(load_bundle(tmp_path / "adapter").model), logits_of(bundle.model))
    report = merge_adapter(tmp_path / "adapter", tmp_path / "out")
    assert report.max_difference <= report.tolerance
    torch.testing.assert_close(
        logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits_of(bundle.model), atol=1e-4, rtol=1e-4
    )


@needs_bitsandbytes
def test_loftq_holds_the_largest_directions_of_the_residual(tmp_path):
    base = save_tiny_model("llama", tmp_path, **WHOLE_BLOCKS["llama"])
    bundle = load_model(base, quantization="4bit")
    name = "model.layers.0.mlp.up_proj.weight"
    from smolora.models.quantised import dequantise

    residual = load_file(base / "model.safetensors")[name] - dequantise(
        bundle.model.get_submodule(name.removesuffix(".weight")), torch.float32
    )
    change = find_changes(attach(bundle, LoftQConfig(r=4, lora_alpha=12)).model)[name]
    u, s, vh = torch.linalg.svd(residual, full_matrices=False)
    expected = u[:, :4] @ s[:4].diag() @ vh[:4]
    torch.testing.assert_close(change.apply(torch.zeros_like(residual)), expected, atol=1e-5, rtol=1e-4)
