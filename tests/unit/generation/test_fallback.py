"""Models that can't be decoded in slots: the same answers by transformers' generate, and a word on why."""

from __future__ import annotations

import pytest
import torch

from smolora.generation.choosing import Row
from smolora.generation.fallback import pad_prompts
from smolora.generation.sampling import SamplingSettings
from smolora.generation.support import find_obstacle, find_shared_reach, is_moved_by_padding
from smolora.generation.text_generator import TextGenerator
from tests.tiny import LONG_ROPE, tiny_bundle, tiny_model

PROMPTS = ["the cat", "name: The Eagle, food: Italian, area:", "the dog sat on the log. Where"]
GREEDY = SamplingSettings(temperature=0.0, max_new_tokens=12)
SAMPLED = SamplingSettings(seed=5, max_new_tokens=12)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return TextGenerator(tiny_bundle("llama", tmp_path_factory.mktemp("plain") / "base"))


@pytest.fixture
def fallen_back(tmp_path):
    """The same model, with a constraint that only transformers knows how to apply, and that changes nothing here."""
    bundle = tiny_bundle("llama", tmp_path / "base")
    bundle.model.generation_config.no_repeat_ngram_size = 60
    return TextGenerator(bundle)


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED, GREEDY.replace(repetition_penalty=9.0)])
def test_answers_are_those_of_slots(plain, fallen_back, settings):
    expected = plain.generate(PROMPTS, settings=settings)
    assert fallen_back.generate(PROMPTS, settings=settings, batch_size=2) == expected
    assert "".join(fallen_back.stream(PROMPTS[0], settings=settings)) == expected[0]


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED, SamplingSettings(num_beams=2, max_new_tokens=12)])
@pytest.mark.parametrize(
    "own",
    [
        {"return_dict_in_generate": True, "output_scores": True},
        {"num_beams": 2, "num_return_sequences": 2},
        {"num_beam_groups": 2, "diversity_penalty": 1.0},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"prompt_lookup_num_tokens": 3},
        {"max_time": 1e-4},
    ],
    ids=", ".join,
)
def test_what_the_models_own_settings_say_of_another_search_or_form_of_result_is_left_aside(
    own, settings, plain, fallen_back
):
    vars(fallen_back.bundle.model.generation_config).update(own)
    assert fallen_back.generate(PROMPTS, settings=settings) == plain.generate(PROMPTS, settings=settings)


def test_each_row_of_a_batch_ends_in_its_place(plain, fallen_back):
    stop = plain.generate(PROMPTS[0], settings=GREEDY)[0][3:5]
    settings = [GREEDY.replace(stop=[stop]), GREEDY.replace(max_new_tokens=3), GREEDY]
    assert fallen_back.generate(PROMPTS, settings=settings) == plain.generate(PROMPTS, settings=settings)


def test_the_reason_is_told_once(fallen_back, caplog):
    for _ in range(2):
        fallen_back.generate(PROMPTS[:1], settings=GREEDY)
    [message] = caplog.messages
    assert "slower: its generation_config.json sets no_repeat_ngram_size" in message


@pytest.mark.parametrize("name", ["encoder_repetition_penalty", "encoder_no_repeat_ngram_size"])
def test_what_transformers_alone_applies_to_a_prompt_is_left_to_it(name):
    model = tiny_model("llama")
    vars(model.generation_config)[name] = 2
    assert find_obstacle(model) == f"its generation_config.json sets {name}"


def test_a_closed_stream_stops_computing(fallen_back):
    steps = []
    hook = fallen_back.bundle.model.register_forward_hook(lambda *_: steps.append(1))
    pieces = fallen_back.stream("the cat", settings=GREEDY.replace(max_new_tokens=60))
    next(pieces)
    num_probed = len(steps)
    pieces.close()
    hook.remove()
    assert len(steps) - num_probed < 50


def test_an_error_in_the_thread_reaches_the_reader(fallen_back):
    hook = fallen_back.bundle.model.register_forward_hook(lambda *_: 1 / 0)
    try:
        with pytest.raises(ZeroDivisionError):
            list(fallen_back.stream("the cat"))
    finally:
        hook.remove()


def test_a_model_whose_state_is_no_keys_and_values_is_found_out(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=288, hidden_size=16, num_hidden_layers=2, state_size=4)).eval()
    assert "with a cache of slots its logits differ by" in find_obstacle(model)


def test_a_deep_model_of_large_weights_that_magnify_every_rounding_has_slots():
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 9}
    model = tiny_model("llama", **shape, num_key_value_heads=3, initializer_range=0.3)
    assert find_obstacle(model) is None


@pytest.mark.parametrize(
    ("family", "is_moved"), [("rwkv", True), ("mamba", False), ("gpt_neo", False), ("llama", False)]
)
def test_a_state_that_padding_gets_into_is_found_out(family, is_moved):
    assert is_moved_by_padding(tiny_model(family)) is is_moved


@pytest.mark.parametrize(
    ("family", "changes", "reach"), [("phi3", LONG_ROPE, 20), ("gpt_neo", {}, 9), ("phi3", {}, None)]
)
def test_rows_share_a_step_up_to_where_a_longer_one_changes_how_they_are_read(family, changes, reach):
    assert find_shared_reach(tiny_model(family, **changes)) == reach


def test_a_least_length_counts_padding_too_so_that_it_parts_prompts_by_length():
    model = tiny_model("llama")
    model.generation_config.min_length = 20
    assert is_moved_by_padding(model)


def test_a_model_of_broken_weights_is_not_said_to_be_slow():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    assert find_obstacle(model) is None


def test_a_model_whose_slots_give_other_logits_is_found_out():
    model = tiny_model("llama")
    model.register_forward_hook(_add_where_there_is_a_cache, with_kwargs=True)
    assert "with a cache of slots its logits differ by" in find_obstacle(model)


def _add_where_there_is_a_cache(module, args, kwargs, output):
    if kwargs.get("past_key_values") is not None:
        output.logits = output.logits + 1e-3


def test_a_model_that_refuses_the_cache_is_found_out():
    model = tiny_model("llama")
    handle = model.model.layers[0].register_forward_pre_hook(_refuse_a_cache, with_kwargs=True)
    assert "refuses a cache with slots (TypeError: no cache, please)" in find_obstacle(model)
    handle.remove()
    assert find_obstacle(model) is None


def _refuse_a_cache(module, args, kwargs):
    if kwargs.get("past_key_values") is not None:
        raise TypeError("no cache, please")


def test_what_an_encoder_reads_is_padded_behind_it():
    rows = [Row([9], 4, SamplingSettings(), source_ids=ids) for ids in ([1, 2, 3], [4])]
    inputs = pad_prompts(rows, torch.device("cpu"))
    assert inputs["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert inputs["decoder_input_ids"].tolist() == [[9], [9]]
