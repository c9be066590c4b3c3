"""Beam search: what transformers finds for each prompt alone, in batches, with an adapter, and up to a stop text."""

from __future__ import annotations

import pytest
import torch

from smolora.adapters.attach import attach_adapter
from smolora.config import LoRAConfig
from smolora.data.prompts import encode_prompt
from smolora.errors import BrokenRunError, ConfigError
from smolora.generation.beams import is_cache_reordered
from smolora.generation.sampling import SamplingSettings
from smolora.generation.text_generator import TextGenerator
from smolora.models.loading import load_model
from tests.tiny import LONG_ROPE, save_tiny_model, tiny_bundle, tiny_model

PROMPTS = ["the cat", "name: The Eagle, food: Italian, area:", "", "the dog sat on the log. Where", "a"]
BEAMS = SamplingSettings(num_beams=4, max_new_tokens=10)
GREEDY = SamplingSettings(temperature=0, max_new_tokens=10)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle("llama", tmp_path_factory.mktemp("beams") / "base")


@pytest.fixture
def generator(bundle):
    return TextGenerator(bundle)


def search_plainly(bundle, prompt, **settings):
    """The naive oracle: transformers alone, one prompt at a time."""
    ids = encode_prompt(prompt, None, bundle.tokenizer) or [bundle.tokenizer.eos_token_id]
    settings = {"num_beams": 4, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, **settings}
    with torch.no_grad():
        found = bundle.model.generate(input_ids=torch.tensor([ids]), **settings)
    return bundle.tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True)


def end_often(bundle):
    """Let the end token be likely, so that beams of one row end at different lengths."""
    with torch.no_grad():
        bundle.model.get_output_embeddings().weight[0] *= 3
    return bundle


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("gpt2", {}), ("bloom", {}), ("phi3", LONG_ROPE)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_batch_of_any_lengths_gets_what_transformers_finds_for_each_alone(family, changes, tmp_path):
    bundle = end_often(tiny_bundle(family, tmp_path / "base", **changes))
    generator = TextGenerator(bundle)
    expected = [search_plainly(bundle, prompt) for prompt in PROMPTS]
    for batch_size in (1, 9, 64):
        assert generator.generate(PROMPTS, settings=BEAMS, batch_size=batch_size) == expected
    assert len({len(answer) for answer in expected}) > 1
    assert expected != generator.generate(PROMPTS, settings=GREEDY)


# RWKV's state has no order to change; RecurrentGemma's and MiniMax's is left in the old one without a word.
@pytest.mark.parametrize("family", ["rwkv", "recurrent_gemma", "minimax"])
def test_beams_whose_cache_can_not_follow_them_find_what_they_find_without_one(family, tmp_path, caplog):
    bundle = tiny_bundle(family, tmp_path / "base")
    expected = [search_plainly(bundle, prompt, use_cache=False) for prompt in PROMPTS]
    assert TextGenerator(bundle).generate(PROMPTS, settings=BEAMS) == expected
    assert "beams of this model read all of their text again for each token" in caplog.text


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mamba"])
def test_beams_keep_what_they_have_read_where_the_cache_follows_them(family):
    assert is_cache_reordered(tiny_model(family))


def test_an_adapter_searches_with_its_own_logits(tmp_path):
    base = load_model(str(save_tiny_model("llama", tmp_path / "base")))
    before = TextGenerator(base).generate(PROMPTS, settings=BEAMS)
    adapted = attach_adapter(base, LoRAConfig(r=4), seed=0)
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    found = TextGenerator(adapted).generate(PROMPTS, settings=BEAMS)
    assert found == [search_plainly(adapted, prompt) for prompt in PROMPTS] != before


def test_a_stop_text_ends_a_beam_as_in_transformers(generator, bundle):
    whole = generator.generate(PROMPTS[0], settings=BEAMS)[0]
    stop = whole[3:5]
    expected = search_plainly(bundle, PROMPTS[0], stop_strings=[stop], tokenizer=bundle.tokenizer)
    found = generator.generate(PROMPTS, settings=BEAMS.replace(stop=(stop,)))[0]
    assert found == expected[: expected.index(stop)]


def test_a_repetition_penalty_spares_the_padding(generator, bundle):
    settings = BEAMS.replace(repetition_penalty=1.8)
    expected = [search_plainly(bundle, prompt, repetition_penalty=1.8) for prompt in PROMPTS]
    assert generator.generate(PROMPTS, settings=settings, batch_size=64) == expected
    assert expected != [search_plainly(bundle, prompt) for prompt in PROMPTS]


def test_each_row_has_its_own_number_of_beams_and_length(generator):
    settings = [BEAMS, GREEDY, BEAMS.replace(num_beams=2), BEAMS.replace(max_new_tokens=3), BEAMS]
    expected = [generator.generate([prompt], settings=own)[0] for prompt, own in zip(PROMPTS, settings, strict=True)]
    assert generator.generate(PROMPTS, settings=settings) == expected


def test_a_stream_is_the_whole_answer_in_the_end(generator):
    assert "".join(generator.stream(PROMPTS[1], settings=BEAMS)) == generator.generate(PROMPTS[1], settings=BEAMS)[0]


def test_logits_that_are_not_finite_are_broken(tmp_path):
    bundle = tiny_bundle("llama", tmp_path / "base")
    with torch.no_grad():
        bundle.model.get_output_embeddings().weight[5, 0] = torch.nan
    with pytest.raises(BrokenRunError, match="not finite"):
        TextGenerator(bundle).generate("the cat", settings=BEAMS)


@pytest.mark.parametrize("given", [{"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.9}, {"seed": 1}])
def test_what_shapes_chance_is_refused_beside_beams(given):
    [name] = given
    with pytest.raises(ConfigError, match=f"num_beams=2 looks for the likeliest answer.*so {name} would change"):
        SamplingSettings(num_beams=2, **given)
    with pytest.raises(ConfigError, match="num_beams=2 looks for"):
        SamplingSettings(num_beams=2).replace(**given)


def test_a_temperature_of_zero_is_no_chance():
    assert not SamplingSettings(num_beams=2, temperature=0).is_drawn
