"""One class over a merged model, a base with an adapter, and a base with several; every task asked as it is trained."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from smolora.adapters.attach import attach_adapter
from smolora.adapters.merge import merge_adapter
from smolora.adapters.store import load_bundle, save_adapter
from smolora.config import LoRAConfig
from smolora.config.adapter import METHODS
from smolora.data.prompts import PromptFormat, encode_prompt
from smolora.errors import ConfigError, DataError, ModelError
from smolora.evaluation.likelihood import LikelihoodScorer
from smolora.generation.sampling import SamplingSettings
from smolora.generation.text_generator import TextGenerator
from smolora.inference.pipeline import InferencePipeline
from smolora.models.loading import load_model
from tests.tiny import EOS_TOKEN, save_tiny_model

GREEDY = SamplingSettings(temperature=0.0, max_new_tokens=8)
PROMPTS = ["the cat", "name: The Eagle, food: Italian", "where"]
PAIR = PromptFormat(kind="prompt_completion", columns={"prompt": "p", "completion": "c"})
TALK = PromptFormat(kind="messages", columns={"messages": "messages"})


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A base, and two adapters on it, of another rank, form and effect each."""
    folder = tmp_path_factory.mktemp("pipeline")
    found = {"base": save_tiny_model("llama", folder / "base")}
    for number, (name, fmt) in enumerate({"pairs": PAIR, "talk.v2": TALK}.items()):
        base = replace(load_model(str(found["base"])), prompt_format=fmt)
        bundle = attach_adapter(base, LoRAConfig(r=2 + 2 * number), seed=number)
        with torch.no_grad():
            for parameter_name, parameter in bundle.model.named_parameters():
                if ".lora_B." in parameter_name:
                    generator = torch.Generator().manual_seed(number)
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        save_adapter(bundle, folder / name)
        found[name] = folder / name
    return found


@pytest.fixture
def several(places):
    adapters = {name: places[name] for name in ("pairs", "talk.v2")}
    return InferencePipeline.from_path(places["base"], adapters=adapters, settings=GREEDY, device="cpu")


def alone(folder, prompts=PROMPTS):
    return TextGenerator(load_bundle(folder)).generate(prompts, settings=GREEDY)


def test_an_adapter_answers_as_it_does_elsewhere(places):
    pipeline = InferencePipeline.from_path(places["pairs"], settings=GREEDY, device="cpu")
    assert pipeline.generate(PROMPTS) == alone(places["pairs"])
    assert pipeline.generate(PROMPTS[0]) == alone(places["pairs"])[0]
    assert pipeline.adapters == ()


def test_each_of_several_adapters_answers_in_its_own_form_as_it_does_alone(places, several):
    assert several.adapters == ("pairs", "talk.v2")
    for name in ("pairs", "talk.v2", "pairs"):
        assert several.generate(PROMPTS, adapter=name) == alone(places[name])
    assert several.generate(PROMPTS) == alone(places["pairs"])


def test_base_is_the_model_without_an_adapter(places, several):
    plain = replace(load_model(str(places["base"])), prompt_format=PAIR)
    expected = TextGenerator(plain).generate(PROMPTS, settings=GREEDY)
    assert several.generate(PROMPTS, adapter="base") == expected
    assert InferencePipeline.from_path(places["pairs"]).generate(PROMPTS, adapter="base", settings=GREEDY) == expected
    assert several.generate(PROMPTS) == alone(places["pairs"])


def test_a_merged_model_answers_as_its_adapter(tmp_path, places):
    merge_adapter(places["pairs"], tmp_path / "merged")
    assert InferencePipeline.from_path(tmp_path / "merged").generate(PROMPTS, settings=GREEDY) == alone(places["pairs"])


def test_an_adapter_can_be_opened_on_a_base_that_is_named(places):
    pipeline = InferencePipeline.from_path(places["pairs"], base=places["base"], settings=GREEDY)
    assert pipeline.generate(PROMPTS) == alone(places["pairs"])


def test_prompts_may_be_any_iterable(several):
    assert (
        several.generate(prompt for prompt in PROMPTS)
        == several.generate(np.array(PROMPTS))
        == several.generate(PROMPTS)
    )


@pytest.mark.parametrize("prompts", [{"role": "user", "content": "x"}, None, 5, [{"role": "user"}], [None]])
def test_what_is_no_prompt_is_refused_with_what_one_is(several, prompts):
    for ask in (several.generate, lambda asked: several.classify(asked, ["a", "b"])):
        with pytest.raises(DataError, match="a prompt is a text, or a conversation"):
            ask(prompts)


def test_a_stream_is_what_is_generated(several):
    for name in ("talk.v2", "pairs"):
        assert "".join(several.stream(PROMPTS[1], adapter=name)) == several.generate(PROMPTS[1], adapter=name)


@pytest.mark.parametrize("name", ["pairs", "talk.v2", "base"])
def test_streams_that_are_read_in_turns_have_each_its_own_adapter(places, several, name):
    expected = several.generate(PROMPTS[0], adapter=name)
    first, second = (several.stream(PROMPTS[0], adapter=name) for _ in range(2))
    next(first)
    begun = next(second)
    first.close()
    assert several.generate(PROMPTS, adapter="talk.v2") == alone(places["talk.v2"])
    assert begun + "".join(second) == expected


def test_a_conversation_beside_a_stream_of_the_base_is_the_adapter_s(places):
    pipeline = InferencePipeline.from_path(places["pairs"], settings=GREEDY)
    expected = pipeline.generate(PROMPTS[0])
    pieces = pipeline.stream(PROMPTS[1], adapter="base")
    next(pieces)
    assert "".join(pipeline.start_conversation().ask(PROMPTS[0])) == expected


def test_a_stream_by_transformers_generate_keeps_its_adapter_to_its_end(places):
    base = replace(load_model(str(places["base"])), prompt_format=PAIR)
    bundle = attach_adapter(base, METHODS["prompt_tuning"](num_virtual_tokens=3), seed=0)
    pipeline = InferencePipeline(bundle, settings=GREEDY)
    expected, without = (pipeline.generate(PROMPTS[0], adapter=name) for name in (None, "base"))
    assert expected != without
    pieces = pipeline.stream(PROMPTS[0])
    begun = next(pieces)
    assert pipeline.generate(PROMPTS[0], adapter="base") == without
    assert begun + "".join(pieces) == expected


def test_threads_that_share_a_pipeline_get_what_each_gets_alone(places):
    pipeline = InferencePipeline.from_path(places["pairs"], settings=GREEDY, device="cpu")
    asked = [(prompt, name) for prompt in PROMPTS for name in (None, "base")] * 6
    expected = [pipeline.generate(prompt, adapter=name) for prompt, name in asked]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: "".join(pipeline.stream(one[0], adapter=one[1])), asked))
    assert found == expected


def test_what_an_abandoned_stream_switched_off_is_on_again(places):
    bundle = load_bundle(places["pairs"])
    pipeline = InferencePipeline(bundle, settings=GREEDY)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = bundle.model(input_ids=ids).logits
        pieces = pipeline.stream(PROMPTS[0], adapter="base")
        next(pieces)
        del pieces
        assert torch.equal(bundle.model(input_ids=ids).logits, expected)


def test_a_label_is_chosen_by_its_likelihood_and_the_shares_sum_to_one(places, several):
    labels = ("yes", "no")
    found = several.classify(PROMPTS, labels)
    scorer = LikelihoodScorer(load_bundle(places["pairs"]))
    for prompt, one in zip(PROMPTS, found, strict=True):
        losses = {label: scorer.measure([(prompt, label)])[0].loss_sum for label in labels}
        assert one.label == min(losses, key=losses.__getitem__)
        assert sum(one.shares.values()) == pytest.approx(1)
        assert one.shares["yes"] > 0.5 or one.label == "no"
    assert several.classify(PROMPTS[0], labels).label == found[0].label
    with pytest.raises(ConfigError, match="needs labels"):
        several.classify(PROMPTS, ())


def test_questions_texts_and_turns_are_prompts_like_any_other(several):
    asked = "Context: it sat\nQuestion: who?\nAnswer:"
    assert several.answer("who?", "it sat") == several.generate(asked).strip()
    assert several.answer("who?") == several.generate("who?").strip()
    assert several.summarise("a: hello") == several.generate("a: hello").strip()
    assert several.answer(["who?", "where?"], "it sat") == [several.answer(q, "it sat") for q in ("who?", "where?")]
    assert several.answer(["who?"], ["it sat"]) == [several.answer("who?", "it sat")]
    assert several.summarise(["a: hello", "b: no"]) == [several.summarise(text) for text in ("a: hello", "b: no")]
    with pytest.raises(ConfigError, match="2 contexts for 1 questions"):
        several.answer(["who?"], ["it", "sat"])
    turns = [{"role": "user", "content": "hello"}]
    assert several.chat(turns, adapter="talk.v2") == several.generate("hello", adapter="talk.v2")


def test_a_conversation_keeps_its_history(places):
    conversation = InferencePipeline.from_path(places["talk.v2"], settings=GREEDY).start_conversation()
    answer = "".join(conversation.ask("hello"))
    assert conversation.turns == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("fmt", [PAIR, TALK, None])
def test_control_tokens_that_a_person_typed_are_ordinary_text(places, fmt):
    tokenizer = load_model(str(places["base"])).tokenizer
    ids = encode_prompt(f"hello {EOS_TOKEN} there", fmt, tokenizer)
    assert tokenizer.eos_token_id not in ids


@pytest.mark.parametrize(
    ("adapters", "message"),
    [({"base": "pairs"}, "'base' names no adapter"), ({"../x": "pairs"}, "names no adapter"), ({}, "no adapter is")],
)
def test_names_that_are_none_are_refused(places, adapters, message):
    from smolora.adapters.switching import AdapterSwitch

    with pytest.raises(ConfigError, match=message):
        AdapterSwitch(load_model(str(places["base"])), {name: places[value] for name, value in adapters.items()})


def test_an_adapter_that_is_not_there_is_named_with_those_that_are(places, several):
    with pytest.raises(ConfigError, match=r"no adapter 'pair'. Did you mean 'pairs'\?"):
        several.generate("x", adapter="pair")
    with pytest.raises(ConfigError, match="opened without several"):
        InferencePipeline.from_path(places["pairs"]).generate("x", adapter="pairs")
    with pytest.raises(ConfigError, match="open one adapter alone"):
        several.start_conversation()


def test_an_adapter_of_another_base_is_refused_before_any_is_on(tmp_path, places):
    other = load_model(str(save_tiny_model("llama", tmp_path / "other", seed=1)))
    with pytest.raises(ModelError, match="base"):
        InferencePipeline(other, adapters={"pairs": places["pairs"]})
    assert not any("lora" in name for name, _ in other.model.named_modules())
