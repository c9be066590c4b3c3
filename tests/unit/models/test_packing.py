from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from smolora.adapters.fast_path import fast_path
from smolora.config import SpeedConfig
from smolora.config.model import GPTConfig
from smolora.generation.support import find_obstacle
from smolora.models.gpt import GPTModel
from smolora.models.loading import load_model
from smolora.models.packing import can_pack_rows, choose_layout
from tests.tiny import (
    FAMILIES,
    PACKABLE_FAMILIES,
    random_input_ids,
    save_tiny_encoder,
    save_tiny_model,
    tiny_bundle,
    tiny_model,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_tells_which_families_can_pack(family):
    assert can_pack_rows(tiny_model(family))[0] == (family in PACKABLE_FAMILIES)


@pytest.mark.parametrize("task", ["classification", "token_classification"])
@pytest.mark.parametrize(("family", "expected"), [("llama", True), ("gpt2", True), ("bloom", False), ("bert", False)])
def test_a_head_over_a_model_that_can_pack_can_pack_too(tmp_path, family, task, expected):
    save = save_tiny_encoder if family == "bert" else save_tiny_model
    bundle = load_model(save(family, tmp_path), task=task, labels=("no", "yes"))
    assert choose_layout(bundle) == ("packed" if expected else "padded")


def test_questions_about_contexts_are_padded(tmp_path):
    assert choose_layout(load_model(save_tiny_model("gpt2", tmp_path), task="qa")) == "padded"


def test_memory_that_runs_out_in_a_probe_is_no_reason_against_the_model(tmp_path):
    bundle = tiny_bundle("llama", tmp_path)
    bundle.model.model.layers[0].register_forward_pre_hook(lambda *_: torch.empty(2**58))
    for probe in (can_pack_rows, find_obstacle, lambda _: fast_path(bundle, SpeedConfig(), is_packed=True).__enter__()):
        with pytest.raises(RuntimeError, match="memory"):
            probe(bundle.model)


def test_the_gpt_to_read_can_pack():
    assert can_pack_rows(GPTModel(GPTConfig(vocab_size=288)))[0]


@pytest.mark.parametrize("family", PACKABLE_FAMILIES)
def test_packed_logits_equal_one_by_one_logits(family):
    model = tiny_model(family)
    rows = [random_input_ids(length, seed=length) for length in (4, 11, 1, 7)]
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    packed = model(input_ids=torch.cat(rows, 1), position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(input_ids=row, use_cache=False).logits for row in rows], 1)
    # float32 rounding: a row alone goes through another kernel. The logits are up to 5 in size.
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


def test_a_leak_is_named_as_the_reason():
    able, reason = can_pack_rows(tiny_model("opt"))
    assert not able
    assert reason.startswith("this model's attention can't keep rows apart that are laid end to end")


def test_a_model_that_takes_no_positions_is_named_as_the_reason():
    able, reason = can_pack_rows(nn.Sequential(nn.Embedding(288, 8), nn.Linear(8, 288)))
    assert not able
    assert "refuses restarting positions (TypeError" in reason


def test_a_bfloat16_model_is_held_to_bfloat16_rounding():
    assert can_pack_rows(tiny_model("llama").bfloat16())[0]


def test_a_deep_model_of_large_weights_that_magnify_every_rounding_can_pack():
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 9}
    model = tiny_model("llama", **shape, num_key_value_heads=3, initializer_range=0.15)
    assert can_pack_rows(model) == (True, "a probe of two packed rows gave each row the logits it has alone")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_experts_whose_products_round_by_how_many_tokens_they_get_can_pack(seed):
    model = tiny_model("mixtral", seed=seed, num_local_experts=8)
    assert can_pack_rows(model) == (True, "a probe of two packed rows gave each row the logits it has alone")


class Leaky(nn.Module):
    """Lets a `share` of the first token into all that lie in its row of the batch, and nothing into rows beside it."""

    def __init__(self, share):
        super().__init__()
        self.model = tiny_model("mixtral", num_local_experts=8)
        self.share = share

    def forward(self, input_ids, position_ids, use_cache):
        vectors = self.model.get_input_embeddings()(input_ids)
        vectors = vectors + self.share * vectors[:, :1]
        return self.model(inputs_embeds=vectors, position_ids=position_ids, use_cache=use_cache)


@pytest.mark.parametrize("share", [1e-4, 1e-1])
def test_between_experts_too_a_row_that_leaks_into_the_next_is_noticed(share):
    able, reason = can_pack_rows(Leaky(share))
    assert not able
    assert "can't keep rows apart" in reason


def test_a_mask_as_long_as_the_context_which_packed_rows_outgrow_is_the_reason():
    assert can_pack_rows(tiny_model("gpt_neo")) == (
        False,
        "its attention has a mask of its own, of 64 tokens, and rows laid end to end may be longer",
    )


def test_layers_that_choose_what_a_token_sees_are_the_reason():
    model = tiny_model("minimax_m3_vl_text", layer_types=["full_attention", "minimax_m3_sparse"])
    assert can_pack_rows(model) == (
        False,
        "two short rows don't show which tokens its layers of kind minimax_m3_sparse see",
    )


class PositionBlind(nn.Module):
    """Ignores where a row begins without looking at other rows: no leak, but the second row isn't itself."""

    def __init__(self):
        super().__init__()
        self.model = tiny_model("gpt2")

    def forward(self, input_ids, position_ids, use_cache):
        running = torch.arange(input_ids.shape[1])[None]
        output = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        output.logits = output.logits + running[..., None] * 0.01
        return output


def test_a_row_that_differs_from_the_row_alone_is_noticed():
    able, reason = can_pack_rows(PositionBlind())
    assert not able
    assert "differs from the row alone" in reason


def test_the_probe_leaves_no_trace():
    model = tiny_model("llama", attention_dropout=0.5).train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    can_pack_rows(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["model.norm.weight"]
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]


def test_behind_virtual_tokens_batches_are_padded_and_the_model_is_not_asked(tmp_path):
    bundle = replace(tiny_bundle("llama", tmp_path / "base"), num_virtual_tokens=4)
    bundle.model.register_forward_pre_hook(lambda *_: pytest.fail("it was asked"))
    assert choose_layout(bundle) == "padded"
