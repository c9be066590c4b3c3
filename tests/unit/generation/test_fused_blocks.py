"""Fused blocks: the same numbers in fewer operations, for the block alone."""

from __future__ import annotations

from functools import partial

import peft
import pytest
import torch
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, SmolLM3Config, SmolLM3ForCausalLM

from smolora.generation import fused_blocks as module
from smolora.generation import slots
from smolora.generation.decoding import fill_slots
from smolora.generation.fused_blocks import FusedBlocks
from smolora.generation.slots import SlotCache, forward, slot_attention
from smolora.generation.step import Step
from smolora.generation.support import find_obstacle
from smolora.models.structure import find_configs
from smolora.runtime.device import has_native_bfloat16
from tests.tiny import VOCAB_SIZE, random_input_ids, tiny_model

CPU = torch.device("cpu")


_TINY = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def tiny_gemma3():
    """Layers with two kinds of rotary angles, one of which sees four tokens, and norms of queries and keys."""
    torch.manual_seed(0)
    layers = ["sliding_attention", "full_attention"]
    model = Gemma3ForCausalLM(Gemma3TextConfig(**_TINY, head_dim=8, sliding_window=4, layer_types=layers)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # They start at zero, where a family that stores weight - 1 shows nothing.
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def tiny_smollm3():
    """Every second layer without positions."""
    torch.manual_seed(0)
    return SmolLM3ForCausalLM(SmolLM3Config(**_TINY, no_rope_layers=[1, 0], pad_token_id=0)).eval()


def replaced(model):
    return [name for name, layer in model.named_modules() if "forward" in vars(layer)]


@torch.no_grad()
def decode_steps(model, blocks=None, *, num_rows):
    """Return the logits of three steps after prompts of two tokens and more, the last step of two tokens."""
    ids = torch.cat([random_input_ids(5 + num_rows, seed=seed) for seed in range(num_rows)])
    cache, longest = SlotCache(num_rows, 5 + num_rows), 1 + num_rows
    with slot_attention(find_configs(model)):
        logits = []
        if blocks:
            fill_slots(model, cache, [row[: 2 + number].tolist() for number, row in enumerate(ids)], blocks=blocks)
        else:
            forward(model, cache, Step.of_prompts(0, num_rows, longest, CPU), ids[:, :longest])
        for places in ([0], [1], [2, 3]):
            positions = torch.arange(num_rows)[:, None] + 2 + torch.tensor(places)  # Others in each row.
            step = Step.of_next_tokens(positions.tolist(), CPU)
            logits.append(forward(model, cache, step, ids.gather(1, positions)))
    return torch.cat(logits, dim=1)


MODELS = {
    **{family: partial(tiny_model, family) for family in ("llama", "mistral", "qwen2", "gemma", "gemma2", "gpt2")},
    "qwen3, whose heads are wider together than the model": partial(tiny_model, "qwen3", head_dim=16),
    "gemma3": tiny_gemma3,
    "smollm3": tiny_smollm3,
}


@pytest.mark.usefixtures("is_intel")
@pytest.mark.parametrize("num_rows", [1, 5], ids=["own weights", "copies"])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_steps_have_the_logits_of_the_model_s_own_blocks(build, num_rows):
    model = build()
    expected = decode_steps(model, num_rows=num_rows)
    blocks = FusedBlocks(model, num_rows=num_rows)
    with blocks.installed():
        found = decode_steps(model, blocks, num_rows=num_rows)
        padded = decode_steps(model, num_rows=num_rows)
    torch.testing.assert_close(padded, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


@torch.no_grad()
def whole_rows(model, *, num_rows):
    """Return what `decode_steps` does, of whole rows at once."""
    ids = torch.cat([random_input_ids(5 + num_rows, seed=seed) for seed in range(num_rows)])
    return torch.stack([logits[2 + row : 6 + row] for row, logits in enumerate(model(ids).logits.float())])


@pytest.mark.parametrize("has_matrix_units", [False, True])
@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_it_says_nothing_else_of_bfloat16_than_its_rounding(family, num_rows, has_matrix_units, monkeypatch):
    monkeypatch.setattr(slots, "has_matrix_units", lambda: has_matrix_units)
    model, exact = tiny_model(family).to(torch.bfloat16), tiny_model(family)
    exact.load_state_dict(model.state_dict())
    expected, plain = whole_rows(exact, num_rows=num_rows), whole_rows(model, num_rows=num_rows)
    blocks = FusedBlocks(model, num_rows=num_rows)
    with blocks.installed():
        found = decode_steps(model, blocks, num_rows=num_rows).float()
    assert 0 < (found - expected).norm() <= 1.5 * (plain - expected).norm()


@pytest.fixture(params=[False, True], ids=["packed", "by MKL"])
def is_intel(request, monkeypatch):
    """Multiply in float32 as on the one kind of processor, and as on the other."""
    monkeypatch.setattr(module, "has_intel_processor", lambda: request.param)
    return request.param


@pytest.mark.usefixtures("is_intel")
@pytest.mark.parametrize("num_rows", [1, 5])
def test_norms_attention_head_and_where_weights_are_copied_gates_are_replaced(num_rows):
    model = tiny_model("llama")
    with FusedBlocks(model, num_rows=num_rows).installed():
        names = replaced(model)
        assert {"model.norm", "model.layers.0.self_attn", "model.layers.1.input_layernorm", "lm_head"} <= set(names)
        assert ("model.layers.0.mlp" in names) == (num_rows > 1)
        # One product of three layers stands for them.
        assert not [name for name in names if name.endswith(("q_proj", "gate_proj"))]
    assert replaced(model) == []


@pytest.mark.parametrize("family", ["gpt2", "phi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_layers_compute_the_same(family, dtype, monkeypatch):
    monkeypatch.setattr(module, "has_intel_processor", lambda: False)
    if dtype == torch.bfloat16 and not has_native_bfloat16(CPU):
        pytest.skip("this processor has no native bfloat16, and nothing is packed in it")
    model, ids = tiny_model(family).to(dtype), random_input_ids(9)
    with torch.no_grad():
        expected = model(ids).logits
        with FusedBlocks(model, num_rows=8).installed():
            assert len(replaced(model)) >= 9
            found = model(ids).logits
    # Sums in another order: a few units in the last place of the largest logit.
    torch.testing.assert_close(found, expected, rtol=0, atol=8 * torch.finfo(dtype).eps * expected.abs().max().item())


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_that_isn_t_merged_counts(targets, use_dora):
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=targets, init_lora_weights=False, use_dora=use_dora
    )
    model = peft.get_peft_model(tiny_model("llama"), settings).eval()
    assert find_obstacle(model) is None
    expected = decode_steps(model, num_rows=5)
    with FusedBlocks(model, num_rows=5).installed():
        found = decode_steps(model, num_rows=5)
        with model.disable_adapter():
            without = decode_steps(model, num_rows=5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))
    assert (without - expected).abs().max() > 0.01


def test_prompts_lie_end_to_end_where_all_attention_takes_them_so(monkeypatch):
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    tuned = peft.get_peft_model(tiny_model("llama"), settings).eval()  # Its blocks aren't where a plain model has them.
    models = tiny_model("llama"), tiny_model("gpt2"), tiny_smollm3(), tuned
    assert [FusedBlocks(model, num_rows=5).packs_prompts for model in models] == [True, False, False, False]
    for has_units in (False, True):
        monkeypatch.setattr(slots, "has_matrix_units", lambda has_units=has_units: has_units)
        assert FusedBlocks(tiny_model("llama").bfloat16(), num_rows=5).packs_prompts == (not has_units)


def test_on_intel_a_head_alone_is_packed_in_float32(monkeypatch):
    monkeypatch.setattr(module, "has_intel_processor", lambda: True)
    monkeypatch.setattr(module, "_WIDE", VOCAB_SIZE)
    packed, pack = [], module.pack
    monkeypatch.setattr(module, "pack", lambda weight, **settings: packed.append(weight) or pack(weight, **settings))
    model = tiny_model("gpt2")
    with torch.no_grad(), FusedBlocks(model, num_rows=5).installed():
        assert replaced(model) == ["lm_head"]
        model(random_input_ids(9))
    assert [len(weight) for weight in packed] == [VOCAB_SIZE]


def test_the_probe_holds_what_decodes_many_rows_to_the_model():
    model = tiny_model("llama")
    model.config.hidden_activation = "gelu"  # A setting that llama's own code doesn't read.
    assert "its logits differ" in find_obstacle(model)


def test_layers_are_their_own_again_after_an_error():
    model = tiny_model("llama")
    with pytest.raises(ZeroDivisionError), FusedBlocks(model, num_rows=8).installed():
        raise ZeroDivisionError
    assert replaced(model) == []


def test_what_is_no_plain_linear_layer_is_left_alone(monkeypatch):
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    mlp.up_proj = Doubled(mlp.up_proj.in_features, mlp.up_proj.out_features)
    model.model.layers[1].mlp.down_proj.double()  # A type that oneDNN doesn't take.
    monkeypatch.setattr(module, "has_intel_processor", lambda: False)
    with FusedBlocks(model, num_rows=8).installed():
        names = replaced(model)
    assert not {f"model.layers.{name}" for name in ("0.mlp", "0.mlp.up_proj", "1.mlp.down_proj")} & set(names)
    assert {f"model.layers.{name}" for name in ("0.mlp.gate_proj", "1.mlp")} <= set(names)


def test_a_model_too_large_for_copies_keeps_its_own_products(monkeypatch):
    monkeypatch.setattr(module, "_MOST_BYTES", 10_000)
    model = tiny_model("llama")
    expected = decode_steps(model, num_rows=5)
    with FusedBlocks(model, num_rows=5).installed():
        linears = [name for name in replaced(model) if isinstance(model.get_submodule(name), nn.Linear)]
        assert linears == ["lm_head"]  # To leave out what nobody reads.
        found = decode_steps(model, num_rows=5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


def test_on_another_device_nothing_is_replaced():
    model = tiny_model("llama").to("meta")
    with FusedBlocks(model, num_rows=8).installed():
        assert replaced(model) == []
