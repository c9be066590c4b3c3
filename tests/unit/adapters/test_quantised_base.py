"""Adapters on a base of few bits: saved, opened, made fast where that is possible, and merged into what was held."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from smolora.adapters.fast_path import fast_path
from smolora.adapters.merge import merge_adapter
from smolora.adapters.store import load_adapter, load_bundle, open_model, save_adapter
from smolora.config import SpeedConfig
from smolora.errors import ModelError
from smolora.models.loading import load_model
from smolora.models.quantised import round_trip
from tests.tiny import WHOLE_BLOCKS, needs_bitsandbytes, random_input_ids, save_tiny_model
from tests.unit.adapters.conftest import attach_moved

KINDS = ("8bit", "4bit")


@pytest.fixture
def save_held(tmp_path):
    """Return a function that saves a tiny base and an adapter made on it in few bits, and returns both folders."""

    def save(kind, family="llama", *, dtype=torch.float32, **settings):
        base = save_tiny_model(family, tmp_path / "base", dtype=dtype, **WHOLE_BLOCKS[family])
        save_adapter(attach_moved(load_model(base, quantization=kind), **settings), tmp_path / "adapter")
        return base, tmp_path / "adapter"

    return save


def logits_of(bundle):
    with torch.no_grad():
        return bundle.model(random_input_ids(20)).logits


def test_an_adapter_names_how_its_base_was_held(save_pair):
    _, adapter = save_pair()
    assert json.loads((adapter / "base_identity.json").read_text())["quantization"] == "none"


def test_an_unknown_way_to_hold_a_base_is_refused(save_pair):
    _, adapter = save_pair()
    identity = json.loads((adapter / "base_identity.json").read_text())
    (adapter / "base_identity.json").write_text(json.dumps({**identity, "quantization": "2bit"}))
    with pytest.raises(ModelError, match="names the quantization '2bit'; known: none, 8bit, 4bit"):
        load_bundle(adapter)


def test_an_adapter_of_an_older_version_was_trained_on_a_plain_base(save_pair, caplog):
    _, adapter = save_pair()
    identity = json.loads((adapter / "base_identity.json").read_text())
    del identity["quantization"]
    (adapter / "base_identity.json").write_text(json.dumps(identity))
    assert load_bundle(adapter).quantization == "none"
    assert not caplog.records


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_opens_on_its_base_as_it_was_held(save_held, tmp_path, kind):
    base, adapter = save_held(kind)
    expected = logits_of(attach_moved(load_model(base, quantization=kind)))
    bundle = load_bundle(adapter)
    assert bundle.quantization == kind
    assert torch.equal(logits_of(bundle), expected)


@needs_bitsandbytes
def test_a_base_that_is_named_is_held_as_the_adapter_s_was(save_held, tmp_path):
    base, adapter = save_held("8bit")
    base.rename(tmp_path / "moved")
    assert open_model(adapter, tmp_path / "moved", device="cpu").quantization == "8bit"


@needs_bitsandbytes
def test_another_way_to_hold_the_base_is_said(save_held, caplog):
    base, adapter = save_held("4bit")
    with caplog.at_level(logging.WARNING, logger="smolora"):
        load_adapter(load_model(base), adapter)
    assert "was trained on its base with quantization 4bit, and goes on it with none" in caplog.text


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_fused_layers_on_a_quantised_base_give_the_plain_ones_logits_and_gradients(save_held, family, kind):
    base, adapter = save_held(kind, family)
    bundle = load_adapter(load_model(base, quantization=kind), adapter, trainable=True)
    ids = random_input_ids(20)

    def compute():
        bundle.model.zero_grad()
        logits = bundle.model(ids).logits
        logits.square().mean().backward()
        return logits, [p.grad for p in bundle.model.parameters() if p.requires_grad]

    expected = compute()
    with fast_path(bundle, SpeedConfig(), is_packed=False) as parts:
        found = compute()
    assert "fused LoRA" in parts.used
    assert not [reason for reason in parts.left if "quantised" in reason]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("target", ["all", "attention_only"])
def test_merged_logits_equal_the_adapter_s_on_the_base_as_held(save_held, tmp_path, kind, family, target):
    base, adapter = save_held(kind, family, target_modules=target)
    report = merge_adapter(adapter, tmp_path / "out")
    expected = logits_of(load_bundle(adapter))
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(random_input_ids(20)).logits
    # float32 rounding of W x + B A x against (W + B A) x; the logits are up to 10 in size.
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    on_plain = logits_of(load_adapter(load_model(base), adapter))
    assert (on_plain - expected).abs().max() > 1e3 * report.max_difference
    assert report.quantization == kind
    assert report.num_merged_tensors == len(load_model(base).anatomy.linear_modules())
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text())["quantization"] == kind


@needs_bitsandbytes
def test_a_bfloat16_base_is_merged_in_float32_and_rounded_once(save_held, tmp_path):
    base, adapter = save_held("4bit", dtype=torch.bfloat16, target_modules=["q_proj"])
    merge_adapter(adapter, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    lora, path = load_file(adapter / "adapter_model.safetensors"), "model.layers.1.self_attn"
    delta = (
        2
        * lora[f"base_model.model.{path}.q_proj.lora_B.weight"]
        @ lora[f"base_model.model.{path}.q_proj.lora_A.weight"]
    )
    held = {name: round_trip(before[f"{path}.{name}.weight"], "4bit") for name in ("q_proj", "k_proj")}
    assert torch.equal(after[f"{path}.q_proj.weight"], (held["q_proj"] + delta).bfloat16())
    assert torch.equal(after[f"{path}.k_proj.weight"], held["k_proj"].bfloat16())
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@needs_bitsandbytes
def test_a_bfloat16_base_s_merge_is_proved_against_dequantised_weights_that_are_not_rounded(save_held, tmp_path):
    base, adapter = save_held("4bit", dtype=torch.bfloat16)
    report = merge_adapter(adapter, tmp_path / "out")
    assert report.compared == "the logits of 8 tokens"
    vocab_size, generator = load_model(base).model.config.vocab_size, torch.Generator().manual_seed(0)
    input_ids = torch.randint(vocab_size, (1, 8), generator=generator)  # The probe's own tokens.
    opened = (load_bundle(folder, dtype=torch.float32) for folder in (tmp_path / "out", adapter))
    with torch.no_grad():
        merged, expected = (bundle.model(input_ids).logits for bundle in opened)
    # Rounded to bfloat16 on the way, the adapter's logits give .039 in place of .028.
    assert report.max_difference == pytest.approx((merged - expected).abs().max().item(), abs=1e-4)
