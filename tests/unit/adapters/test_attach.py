from __future__ import annotations

import re

import pytest
import torch
from transformers import CanineConfig, CanineForSequenceClassification

from smolora.adapters.attach import attach_adapter, is_adapted, setup_model_with_lora
from smolora.adapters.fast_path import fast_path
from smolora.adapters.targets import resolve_target_modules
from smolora.adapters.tensor_places import find_lora_pairs
from smolora.adapters.wrapper import PEFTModelWrapper
from smolora.config.adapter import LoRAConfig, PrefixTuningConfig, PromptTuningConfig, PTuningConfig
from smolora.config.model import GPTConfig
from smolora.config.speed import SpeedConfig
from smolora.errors import ConfigError, ModelError
from smolora.models.anatomy import build_anatomy
from smolora.models.bundle import ModelBundle
from smolora.models.gpt import GPTModel
from smolora.models.packing import can_pack_rows
from tests.tiny import FAMILIES, random_input_ids, save_tiny_model, tiny_bundle, tiny_model, tiny_tokenizer


def lora_tensors(model):
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_changes_no_logit(tmp_path, family):
    bundle = tiny_bundle(family, tmp_path)
    before = bundle.model(random_input_ids(9)).logits
    adapted = attach_adapter(bundle, LoRAConfig(), seed=0)
    adapted.model.eval()
    assert torch.equal(adapted.model(random_input_ids(9)).logits, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_adapter_is_trained_and_on_exactly_the_targets(tmp_path, family):
    bundle = tiny_bundle(family, tmp_path)
    targets = resolve_target_modules(bundle.anatomy, "both")
    model = attach_adapter(bundle, LoRAConfig(target_modules="both"), seed=0).model
    expected = {f"base_model.model.{path}.lora_{side}.default.weight" for path in targets for side in "AB"}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected


def test_the_adapter_is_float32_over_a_bfloat16_base(tmp_path):
    bundle = attach_adapter(tiny_bundle("llama", tmp_path, dtype=torch.bfloat16), LoRAConfig(), seed=0)
    assert {parameter.dtype for parameter in lora_tensors(bundle.model).values()} == {torch.float32}
    assert bundle.dtype == torch.bfloat16


def test_the_seed_decides_and_the_global_generator_is_left_alone(tmp_path):
    folder = save_tiny_model("llama", tmp_path)
    drawn = []
    for seed, noise in ((7, 1), (7, 2), (8, 1)):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        wrapper = PEFTModelWrapper(str(folder), seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append(torch.cat([tensor.flatten() for tensor in lora_tensors(wrapper.model).values()]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_rank_alpha_and_dropout_arrive(tmp_path):
    bundle = attach_adapter(
        tiny_bundle("gpt2", tmp_path), LoRAConfig(r=3, lora_alpha=12, lora_dropout=0.25, target_modules="c_fc"), seed=0
    )
    layer = bundle.model.get_submodule("base_model.model.transformer.h.1.mlp.c_fc")
    assert layer.lora_A["default"].weight.shape == (3, 32)
    assert layer.scaling["default"] == 4
    assert layer.lora_dropout["default"].p == 0.25


def test_the_anatomy_finds_every_adapter_tensor(tmp_path):
    bundle = attach_adapter(tiny_bundle("gpt2", tmp_path), LoRAConfig(), seed=0)
    groups = {name: bundle.anatomy.part_of(name) for name in lora_tensors(bundle.model)}
    assert {part.group for part in groups.values()} == {"attention", "mlp"}
    assert all(name.startswith(f"base_model.model.{part.name}.lora_") for name, part in groups.items())


def test_a_second_adapter_is_refused(tmp_path):
    bundle = attach_adapter(tiny_bundle("llama", tmp_path), LoRAConfig(), seed=0)
    assert is_adapted(bundle)
    with pytest.raises(ConfigError, match="carries an adapter already"):
        attach_adapter(bundle, LoRAConfig(), seed=0)


def test_the_gpt_to_read_is_adapted_in_its_saved_form(tmp_path):
    model = GPTModel(GPTConfig(vocab_size=288, width=32, num_layers=2))
    bundle = ModelBundle(model, tiny_tokenizer(), build_anatomy(model), source="memory", fingerprint="")
    with pytest.raises(ModelError, match="Save it with save_pretrained"):
        attach_adapter(bundle, LoRAConfig(), seed=0)


def test_a_misspelt_target_leaves_the_base_as_it_was(tmp_path):
    bundle = tiny_bundle("llama", tmp_path)
    with pytest.raises(ConfigError, match="q_projj"):
        attach_adapter(bundle, LoRAConfig(target_modules="q_projj"), seed=0)
    assert all(parameter.requires_grad for parameter in bundle.model.parameters())


def test_a_model_in_memory_can_be_set_up_without_a_bundle():
    model = setup_model_with_lora(tiny_model("opt"), LoRAConfig(r=2, target_modules="attention_only"))
    assert len(lora_tensors(model)) == 2 * 2 * 2  # layers, query and value, A and B


def test_the_wrapper_saves_a_peft_folder(tmp_path):
    wrapper = PEFTModelWrapper(str(save_tiny_model("llama", tmp_path / "base")), LoRAConfig(r=2))
    wrapper.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("is_training", [True, False])
def test_train_or_eval_mode_is_kept_so_that_no_dropout_starts_unasked(tmp_path, is_training):
    bundle = tiny_bundle("llama", tmp_path)
    bundle.model.train(is_training)
    model = attach_adapter(bundle, LoRAConfig(lora_dropout=0.5), seed=0).model
    assert {module.training for module in model.modules()} == {is_training}


def test_an_adapted_model_packs_rows_as_its_base_does(tmp_path):
    assert can_pack_rows(attach_adapter(tiny_bundle("llama", tmp_path / "a"), LoRAConfig(), seed=0).model)[0]
    assert not can_pack_rows(attach_adapter(tiny_bundle("opt", tmp_path / "b"), LoRAConfig(), seed=0).model)[0]


@pytest.mark.parametrize(
    ("family", "named"),
    [
        ("mixtral", ["no adapter can go on experts: 18,432 of 43,296 parameters stay as they are"]),
        ("mamba", ["no adapter can go on dt_proj and out_proj: 4,480 of 24,544 parameters stay as they are"]),
        ("llama", []),
    ],
)
def test_what_no_adapter_can_go_on_is_named(tmp_path, caplog, family, named):
    caplog.set_level("INFO", "smolora.adapters.attach")
    attach_adapter(tiny_bundle(family, tmp_path), LoRAConfig(), seed=0)
    assert caplog.messages == named


def test_patterns_give_modules_ranks_and_scales_of_their_own_and_the_longest_name_wins(tmp_path):
    first = "model.layers.0.mlp.down_proj"
    config = LoRAConfig(
        r=4, lora_alpha=8, rank_pattern={first: 3, "down_proj": 2}, alpha_pattern={"mlp.down_proj": 1.5}
    )
    model = attach_adapter(tiny_bundle("llama", tmp_path), config, seed=0).model
    pairs = {pair.module: pair for pair in find_lora_pairs(model)}
    found = {name: (len(pairs[name].a), pairs[name].scaling) for name in (first, first.replace("0", "1"))}
    assert found == {first: (3, 0.5), first.replace("0", "1"): (2, 0.75)}
    others = [pair for name, pair in pairs.items() if not name.endswith("down_proj")]
    assert {(len(pair.a), pair.scaling) for pair in others} == {(4, 2.0)}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ({"down_projj": 2}, "adapter.rank_pattern: no module named 'down_projj' in 'llama'. Did you mean 'down_proj'?"),
        ({"down_proj": 2}, "adapter.rank_pattern: 'down_proj' isn't adapted. Add it to adapter.target_modules"),
    ],
)
def test_a_pattern_for_what_is_not_adapted_is_refused(tmp_path, pattern, message):
    bundle = tiny_bundle("llama", tmp_path)
    with pytest.raises(ConfigError, match=re.escape(message)):
        attach_adapter(bundle, LoRAConfig(target_modules="q_proj", rank_pattern=pattern), seed=0)


@pytest.fixture
def canine():
    """A model that hashes characters, where others look up embeddings of tokens."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = CanineForSequenceClassification(CanineConfig(**sizes, num_hash_buckets=64)).eval()
    return ModelBundle(model, tiny_tokenizer(), build_anatomy(model), source="", fingerprint="", task="classification")


def test_a_model_without_embeddings_of_tokens_takes_lora_and_the_fast_path(canine, caplog):
    ids = random_input_ids(9)
    before = canine.model(ids).logits
    adapted = attach_adapter(canine, LoRAConfig(), seed=0)
    adapted.model.eval()
    assert torch.equal(adapted.model(ids).logits, before)
    with fast_path(adapted, SpeedConfig(), is_packed=False) as parts, torch.no_grad():
        assert "fused LoRA" in parts.used
        torch.testing.assert_close(adapted.model(ids).logits, before)  # To float32's rounding.
    assert not caplog.messages


@pytest.mark.parametrize("config", [PromptTuningConfig(), PTuningConfig(), PrefixTuningConfig()])
def test_a_model_without_embeddings_of_tokens_takes_no_virtual_ones(canine, config):
    with pytest.raises(ConfigError, match=f"{config.method} puts virtual tokens before the embeddings of others"):
        attach_adapter(canine, config, seed=0)
