"""Decoding in slots: the same tokens as transformers' generate, whatever is decoded beside a row."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import GenerationConfig

from smolora.generation import decoding, fused_blocks, slots, tables
from smolora.generation.choosing import Row
from smolora.generation.decoding import decode
from smolora.generation.sampling import SamplingSettings
from smolora.generation.step import Step, making
from smolora.generation.support import find_obstacle
from tests.tiny import FAMILIES, VOCAB_SIZE, random_input_ids, tiny_model

GREEDY = SamplingSettings(temperature=0.0)
LENGTHS = (9, 1, 17, 5, 2, 23, 12, 3, 30)
ROOMS = (12, 7, 20, 1, 15, 9, 3, 25, 6)


def _rows(settings=GREEDY):
    prompts = [random_input_ids(length, seed=seed)[0].tolist() for seed, length in enumerate(LENGTHS)]
    return [
        Row(ids, room, settings, key=bytes([number]))
        for number, (ids, room) in enumerate(zip(prompts, ROOMS, strict=True))
    ]


def _answers(model, rows, num_slots):
    for _ in decode(model, rows, num_slots=num_slots):
        pass
    assert all(row.is_done for row in rows)
    return [row.ids for row in rows]


@cache
def _generate_all(family, **changes):
    """The oracle: transformers' own generation of each prompt alone, without padding."""
    model = tiny_model(family, **changes)
    return [_generate_alone(model, row) for row in _rows()]


def _generate_alone(model, row):
    config = GenerationConfig(max_new_tokens=row.room, do_sample=False, eos_token_id=VOCAB_SIZE, pad_token_id=0)
    ids = torch.tensor([row.prompt_ids])
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return output[0, len(row.prompt_ids) :].tolist()


@pytest.fixture(params=["tables", "products", "kernel"])
def attention(request, monkeypatch):
    """Attend by what is chosen for many rows, for many queries a row, and for very few rows: by each for all."""
    monkeypatch.setattr(slots, "_reads_tables", lambda like, num_rows: request.param != "kernel")
    monkeypatch.setattr(tables, "_FEW", 0 if request.param == "products" else 10**6)


@pytest.mark.usefixtures("attention")
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_of_mixed_rows_equal_those_of_generate_one_by_one(family):
    model = tiny_model(family)
    assert find_obstacle(model) is None
    for num_slots in (1, 4, 9):
        assert _answers(model, _rows(), num_slots) == _generate_all(family)


@pytest.mark.parametrize("longest_packed", [0, 10, 512], ids=["padded", "both", "packed"])
@pytest.mark.parametrize(("family", "settings"), [("llama", {}), ("qwen3", {}), ("mistral", {"sliding_window": 6})])
def test_prompts_fill_slots_end_to_end_or_padded(family, settings, longest_packed, monkeypatch):
    monkeypatch.setattr(decoding, "_LONGEST_PACKED", longest_packed)
    monkeypatch.setattr(decoding, "_MOST_PACKED", 20)
    monkeypatch.setattr(decoding, "_MOST_PADDED", 50)
    kinds, forward = [], decoding.forward
    monkeypatch.setattr(
        decoding, "forward", lambda model, cache, step, ids: kinds.append(step) or forward(model, cache, step, ids)
    )
    assert _answers(tiny_model(family, **settings), _rows(), 9) == _generate_all(family, **settings)
    filled = [(step.packed is not None, step.num_keys) for step in kinds if step.fills]
    assert [is_packed for is_packed, _ in filled] == [longest <= longest_packed for _, longest in filled]
    assert len(filled) > 2
    assert {is_packed for is_packed, _ in filled} == {0: {False}, 10: {False, True}, 512: {True}}[longest_packed]


@pytest.mark.parametrize(("settings", "is_causal"), [({}, True), ({"sliding_window": 6}, False)])
def test_the_kernel_reads_no_mask_that_hides_nothing_but_what_lies_behind(settings, is_causal, monkeypatch):
    monkeypatch.setattr(decoding, "_LONGEST_PACKED", 0)
    masks, kernel = [], slots.sdpa_attention_forward
    monkeypatch.setattr(
        slots, "sdpa_attention_forward", lambda *args, **kw: masks.append(args[4]) or kernel(*args, **kw)
    )
    assert _answers(tiny_model("mistral", **settings), _rows(), 9) == _generate_all("mistral", **settings)
    assert [mask is None for mask in masks] == [is_causal] * len(masks)


@pytest.mark.usefixtures("attention")
@pytest.mark.parametrize("family", ["mistral", "gemma2", "phi3"])
def test_a_sliding_window_hides_the_same_keys_as_in_generate(family):
    model = tiny_model(family, sliding_window=6)
    expected = _generate_all(family, sliding_window=6)
    assert _answers(model, _rows(), 4) == expected
    assert expected != _generate_all(family, sliding_window=64)


@pytest.mark.usefixtures("attention")
def test_a_softcap_on_attention_is_applied():
    model = tiny_model("gemma2", attn_logit_softcapping=0.5)
    expected = _generate_all("gemma2", attn_logit_softcapping=0.5)
    assert _answers(model, _rows(), 4) == expected
    assert expected != _generate_all("gemma2")


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt2"])
def test_rows_look_up_what_the_masks_of_a_family_show(family, monkeypatch):
    monkeypatch.setattr(slots, "_reads_tables", lambda like, num_rows: True)
    monkeypatch.setattr(tables, "_FEW", 10**6)
    monkeypatch.setattr(slots, "_attend_in_blocks", lambda *_, **__: pytest.fail("no lookups"))
    settings = {"mistral": {"sliding_window": 6}, "gemma2": {"sliding_window": 6, "attn_logit_softcapping": None}}
    settings = settings.get(family, {})  # Every other layer of gemma2 has a window; with a cap it fills in blocks.
    assert _answers(tiny_model(family, **settings), _rows(), 4) == _generate_all(family, **settings)


@pytest.mark.parametrize("has_matrix_units", [False, True])
def test_queries_and_keys_are_turned_in_float32_where_tables_compare_them(has_matrix_units, monkeypatch):
    monkeypatch.setattr(slots, "has_matrix_units", lambda: has_matrix_units)
    cpu, num_rows, found = torch.device("cpu"), slots.FEWEST_ROWS, []
    for step in (Step.of_prompts(0, num_rows, 1, cpu), Step.of_next_tokens([[1]] * num_rows, cpu)):
        angles = torch.ones(num_rows, 1, 8, dtype=torch.bfloat16)
        with making(step):
            turned = slots.SlotCache(num_rows, 2).turn(angles[:, :, None].clone(), angles, angles)
        found.append(turned.dtype)
    assert found == [torch.bfloat16, torch.bfloat16 if has_matrix_units else torch.float32]


@pytest.mark.parametrize("has_matrix_units", [False, True])
@pytest.mark.parametrize("family", ["bloom", "gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_families_that_multiply_cached_keys_themselves_decode_in_slots_in_16_bits(
    family, dtype, has_matrix_units, monkeypatch
):
    monkeypatch.setattr(slots, "has_matrix_units", lambda: has_matrix_units)
    assert find_obstacle(tiny_model(family).to(dtype)) is None


def test_bfloat16_rows_stay_close_to_those_alone():
    model = tiny_model("llama").to(torch.bfloat16)
    together, alone = _answers(model, _rows(), 9), _answers(model, _rows(), 1)
    assert [ids[0] for ids in together] == [ids[0] for ids in alone]


def test_drawn_tokens_do_not_depend_on_the_rows_beside():
    model, settings = tiny_model("llama"), SamplingSettings(temperature=1.3, top_p=0.9)
    assert _answers(model, _rows(settings), 9) == _answers(model, _rows(settings), 1)


def test_rows_of_one_batch_follow_their_own_settings():
    model, drawn = tiny_model("llama"), SamplingSettings(temperature=1.3)
    mixed = [(_rows(drawn) if number % 2 else _rows())[number] for number in range(len(LENGTHS))]
    greedy, sampled = _answers(model, _rows(), 4), _answers(model, _rows(drawn), 4)
    expected = [(sampled if number % 2 else greedy)[number] for number in range(len(LENGTHS))]
    assert _answers(model, mixed, 4) == expected


def test_a_row_that_is_done_makes_room_for_one_that_waits():
    rows = _rows()
    num_steps = sum(1 for _ in decode(tiny_model("llama"), rows, num_slots=2))
    assert num_steps <= sum(ROOMS) // 2 + 1  # Pairs that wait for each other, even the most alike, take 56.


@pytest.mark.usefixtures("attention")
def test_slots_that_grow_keep_what_they_hold(monkeypatch):
    model = tiny_model("llama")
    expected = _answers(model, _rows(), 4)
    monkeypatch.setattr(slots, "_HEADROOM", 1)
    monkeypatch.setattr(decoding, "_MOST_PACKED", 40)
    assert _answers(model, sorted(_rows(), key=lambda row: len(row.prompt_ids)), 4) == [
        expected[number] for number in sorted(range(len(LENGTHS)), key=LENGTHS.__getitem__)
    ]


@pytest.mark.usefixtures("attention")
def test_memory_left_by_others_reaches_no_row():
    class Poisoned(torch.utils._python_dispatch.TorchDispatchMode):
        """Memory that nobody wrote holds NaN, as it may."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if (
                func in {torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default}
                and result.is_floating_point()
            ):
                result.fill_(torch.nan)
            return result

    model = tiny_model("llama")
    expected = _answers(model, _rows(), 4)
    with Poisoned():
        assert _answers(model, _rows(), 4) == expected


def test_the_head_is_given_hidden_states_without_gaps(monkeypatch):
    monkeypatch.setattr(fused_blocks, "_MOST_BYTES", 0)  # As of a large model, whose head computes by itself.
    model, have_gaps = tiny_model("llama"), []
    model.lm_head.register_forward_pre_hook(lambda _module, inputs: have_gaps.append(not inputs[0].is_contiguous()))
    _answers(model, _rows(), num_slots=4)
    assert have_gaps
    assert not any(have_gaps)


def test_decoding_leaves_the_model_as_it_was():
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    implementation = model.config._attn_implementation
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _answers(model, _rows(), 4)
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == implementation
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_an_error_in_the_middle_leaves_the_model_as_it_was():
    model = tiny_model("llama")
    implementation = model.config._attn_implementation
    hook = model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _answers(model, _rows(), 4)
    hook.remove()
    assert model.config._attn_implementation == implementation
    assert all("forward" not in vars(module) for module in model.modules())
